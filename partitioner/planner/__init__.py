"""The planner: which mesh, cuts, replicated layers and deeper halos, and what each costs beforehand."""
