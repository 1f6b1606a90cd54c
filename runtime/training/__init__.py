"""Training: a plan's programs as differentiable torch code, its gradients, its losses.

    communication   exchanges and merges as autograd functions: forward as inference does, backward the adjoints
    differentiable  one pass over the steps of all local ranks, every value a tensor of its own
    module          the plan as a torch.nn.Module
    gradients       sums of the parameters' gradients over ranks
    losses          losses over shards, equal to those over the whole volume
    data            each rank's part of the samples, in an order that all ranks have verified
    cases           volumes of one patient, of which a rank reads its own cells
    augment         flips, crops and intensities, drawn alike on every rank
"""
