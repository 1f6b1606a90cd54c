"""Published architectures, small and with random weights, as torch modules to export.

`ARCHITECTURES` maps `package/name` to an `Architecture`. Packages (group `networks` in pyproject.toml) are imported
only when a module is built; no weights are downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests import architectures_in_torch as own

Exporter = Literal["dynamo", "torchscript"]
INPUT_NAME, OUTPUT_NAME = "x", "y"
AXES = ("depth", "height", "width")


@dataclass(frozen=True)
class Architecture:
    """A network and the shapes (batch, channels, *spatial) that it is tried with.

    Args:
        other: another shape that a file with open axes takes; None where the network fixes its extents.
        local: fully convolutional, at most with statistics: nothing need be gathered.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    other: tuple[int, ...] | None = None
    local: bool = True

    @property
    def dims(self) -> int:
        """How many spatial axes."""
        return len(self.shape) - 2

    def build(self) -> nn.Module:
        """The module in inference mode; the same weights every time."""
        torch.manual_seed(7)
        with quiet():
            module = FirstOutput(self.make()).eval()
        randomise(module)
        return module


class FirstOutput(nn.Module):
    """The first tensor that a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.module(x)
        while not isinstance(found, Tensor):
            found = next(iter(found.values())) if isinstance(found, Mapping) else found[0]
        return found


class Method(nn.Module):
    """One method of a module as its forward."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.name)(x)


class AtStep(nn.Module):
    """A diffusion model at one time step."""

    def __init__(self, module: nn.Module, step: int) -> None:
        super().__init__()
        self.module, self.step = module, step

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, torch.full((x.shape[0],), self.step, dtype=torch.int64))


def randomise(module: nn.Module) -> None:
    """Statistics and parameters that start as constants become random, so that no branch is multiplied by 0."""
    for name, parameter in module.named_parameters():
        data = parameter.data
        if not data.is_floating_point() or data.numel() == 0 or (data != data.flatten()[0]).any():
            continue
        if name.endswith("bias") or not data.any():
            data.normal_(0, 0.1)
        else:
            data.mul_(torch.rand_like(data) + 0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


# --- packages ----------------------------------------------------------------------------------------


def monai() -> ModuleType:
    """MONAI's networks."""
    vision()
    import monai.networks.nets as nets

    return nets


def nnunet() -> ModuleType:
    """nnU-Net's networks."""
    vision()
    from dynamic_network_architectures.architectures import unet

    return unet


def smp() -> ModuleType:
    """segmentation-models-pytorch."""
    vision()
    import segmentation_models_pytorch

    return segmentation_models_pytorch


def timm(name: str, features: bool = False) -> nn.Module:
    """A model of timm by name; with `features` the feature maps of its stages instead of classes."""
    vision()
    import timm as package

    options = {"features_only": True} if features else {"num_classes": 5}
    return package.create_model(name, pretrained=False, **options)


_LIBRARIES: list[torch.library.Library] = []


def vision() -> None:
    """Let torchvision be imported beside a torch of another build: declare two of its operators, never called.

    torchvision from the package index holds kernels for CUDA's torch only; timm and others import it all the same.
    """
    if _LIBRARIES:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")


def installed(package: str) -> bool:
    """Whether the package of a name in ARCHITECTURES is here."""
    needs = {"monai": ("monai",), "nnunet": ("dynamic-network-architectures", "timm", "torchvision"),
             "smp": ("segmentation-models-pytorch", "timm", "torchvision"), "timm": ("timm", "torchvision")}
    try:
        for name in needs.get(package, ()):
            importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# --- export ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the packages' and exporters' remarks."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def export(architecture: Architecture, path: Path, exporter: Exporter, dynamic: bool) -> None:
    """Write an ONNX file, spatial axes (and the batch) open where asked.

    Raises:
        Exception: whatever torch.onnx raises where it cannot.
    """
    module, example = architecture.build(), torch.randn(architecture.shape)
    with quiet(), torch.no_grad():
        if exporter == "dynamo":
            axes = {a: torch.export.Dim.AUTO for a in (0, *range(2, example.ndim))}
            torch.onnx.export(module, (example,), path, input_names=[INPUT_NAME], output_names=[OUTPUT_NAME],
                              dynamo=True, external_data=False, dynamic_shapes=(axes,) if dynamic else None,
                              verbose=False)
            return
        names = dict(zip(range(2, example.ndim), AXES[3 - architecture.dims:], strict=True))
        torch.onnx.export(module, (example,), path, input_names=[INPUT_NAME], output_names=[OUTPUT_NAME],
                          dynamo=False, dynamic_axes={INPUT_NAME: {0: "batch", **names}} if dynamic else None)


# --- the collection ----------------------------------------------------------------------------------


def _plain_unet(dims: int, residual: bool) -> nn.Module:
    conv, norm = ((nn.Conv2d, nn.InstanceNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[dims - 2]
    if residual:
        return nnunet().ResidualEncoderUNet(
            1, 3, (4, 6, 8), conv, 3, (1, 2, 2), (1, 2, 2), 2, (1, 1), True, norm, {"affine": True},
            nonlin=nn.LeakyReLU)
    return nnunet().PlainConvUNet(
        1, 3, (4, 6, 8), conv, 3, (1, 2, 2), (2, 2, 2), 2, (2, 2), True, norm, {"affine": True}, nonlin=nn.LeakyReLU)


def _diffusion() -> nn.Module:
    return AtStep(monai().DiffusionModelUNet(
        2, 1, 1, num_res_blocks=1, channels=(8, 8), attention_levels=(False, True), norm_num_groups=4,
        num_head_channels=4), 17)


def _autoencoder_kl(attention: bool) -> nn.Module:
    return Method(monai().AutoencoderKL(
        3, 1, 1, 1, (4, 8), (False, attention), 3, 4, with_encoder_nonlocal_attn=attention,
        with_decoder_nonlocal_attn=attention), "reconstruct")


def _vqvae() -> nn.Module:
    return monai().VQVAE(3, 1, 1, (4, 8), 1, (4, 8), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, 8, 4)


def _dints() -> nn.Module:
    nets = monai()
    return nets.DiNTS(nets.TopologyInstance(channel_mul=0.125, num_blocks=2, num_depths=2), 1, 2)


def _efficientnet3d() -> nn.Module:
    blocks = ["r1_k3_s11_e1_i32_o16_se0.25", "r1_k3_s22_e6_i16_o24_se0.25", "r2_k5_s22_e6_i24_o40_se0.25"]
    return monai().EfficientNet(blocks, 3, 1, 4, 0.25, depth_divisor=4, image_size=33)


def _swin2d() -> nn.Module:
    vision()
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(img_size=(56, 84), patch_size=4, window_size=7, embed_dim=12, depths=(2, 2),
                           num_heads=(2, 4), num_classes=5)


ARCHITECTURES: dict[str, Architecture] = {
    "monai/unet": Architecture(
        lambda: monai().UNet(3, 1, 2, (4, 8, 12), (2, 2), num_res_units=2), (1, 1, 20, 28, 12), (1, 1, 12, 36, 20)),
    "monai/unet2d-batch": Architecture(
        lambda: monai().UNet(2, 3, 2, (4, 8, 12), (2, 2), norm="batch"), (2, 3, 44, 36), (1, 3, 28, 52)),
    "monai/basic-unet": Architecture(
        lambda: monai().BasicUNet(3, 1, 2, (4, 4, 6, 6, 8, 4)), (1, 1, 33, 37, 35), (1, 1, 49, 37, 19)),
    "monai/basic-unet-linear": Architecture(
        lambda: monai().BasicUNet(2, 1, 2, (4, 4, 6, 6, 8, 4), upsample="nontrainable"), (1, 1, 67, 53),
        (1, 1, 51, 69)),
    "monai/basic-unet-plus-plus": Architecture(
        lambda: monai().BasicUNetPlusPlus(2, 1, 2, (4, 4, 6, 6, 8, 4)), (1, 1, 48, 80), (1, 1, 64, 48)),
    "monai/attention-unet": Architecture(
        lambda: monai().AttentionUnet(3, 1, 2, (4, 8, 12), (2, 2)), (1, 1, 20, 12, 28), (1, 1, 12, 20, 12)),
    "monai/dyn-unet": Architecture(
        lambda: monai().DynUNet(3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), (4, 6, 8), res_block=True), (1, 1, 20, 28, 12),
        (1, 1, 12, 20, 20)),
    "monai/dyn-unet-anisotropic": Architecture(
        lambda: monai().DynUNet(3, 1, 2, ((1, 3, 3), 3, 3), (1, (1, 2, 2), 2), ((1, 2, 2), 2), (4, 6, 8)),
        (1, 1, 14, 28, 20), (1, 1, 10, 20, 12)),
    "monai/seg-resnet": Architecture(
        lambda: monai().SegResNet(3, 8, 1, 2, blocks_down=(1, 2, 2), blocks_up=(1, 1)), (1, 1, 20, 12, 28),
        (1, 1, 12, 20, 20)),
    "monai/seg-resnet-vae": Architecture(
        lambda: monai().SegResNetVAE((20, 12, 28), vae_nz=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        (1, 1, 20, 12, 28)),
    "monai/seg-resnet-ds": Architecture(
        lambda: monai().SegResNetDS(3, 4, 1, 2, blocks_down=(1, 1, 1)), (1, 1, 20, 12, 28), (1, 1, 12, 20, 20)),
    "monai/vnet": Architecture(lambda: monai().VNet(2, 1, 2, dropout_dim=2), (1, 1, 48, 80), (1, 1, 80, 48)),
    "monai/unetr": Architecture(
        lambda: monai().UNETR(1, 2, (32, 48, 32), 2, 12, 16, 3), (1, 1, 32, 48, 32), local=False),
    "monai/swin-unetr": Architecture(
        lambda: monai().SwinUNETR(1, 2, 2, (1, 1, 1, 1), (1, 1, 1, 1), 3, feature_size=12, spatial_dims=2),
        (1, 1, 96, 64), local=False),
    "monai/high-resnet": Architecture(
        lambda: monai().HighResNet(3, 1, 2, layer_params=(
            {"name": "conv_0", "n_features": 4, "kernel_size": 3},
            {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 2},
            {"name": "res_2", "n_features": 6, "kernels": (3, 3), "repeat": 2},
            {"name": "conv_1", "n_features": 8, "kernel_size": 1}, {"name": "conv_2", "kernel_size": 1})),
        (1, 1, 13, 17, 11), (2, 1, 15, 9, 19)),
    "monai/dense-net": Architecture(
        lambda: monai().DenseNet(3, 1, 5, 4, 4, (2, 3), 2), (1, 1, 33, 29, 27), (1, 1, 25, 31, 35), local=False),
    "monai/resnet10": Architecture(
        lambda: monai().ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 8], 3, 1, num_classes=5, conv1_t_stride=2),
        (1, 1, 35, 41, 33), (1, 1, 43, 33, 37), local=False),
    "monai/efficient-net": Architecture(_efficientnet3d, (1, 1, 33, 29, 27), local=False),
    "monai/voxel-morph": Architecture(
        lambda: monai().VoxelMorphUNet(3, 2, 3, (4, 4, 6, 6, 4, 4), (4, 3)), (1, 2, 16, 24, 24), (1, 2, 24, 16, 16)),
    "monai/local-net": Architecture(
        lambda: monai().LocalNet(3, 2, 4, (0, 1, 2), out_channels=3), (1, 2, 20, 12, 28), (1, 2, 12, 20, 20)),
    "monai/reg-unet": Architecture(
        lambda: monai().RegUNet(3, 2, 4, 2, out_channels=3), (1, 2, 20, 12, 28), (1, 2, 12, 20, 20)),
    "monai/auto-encoder": Architecture(
        lambda: monai().AutoEncoder(3, 1, 1, (4, 8), (2, 2), inter_channels=[8], inter_dilations=[2]),
        (1, 1, 21, 14, 27), (1, 1, 15, 22, 18)),
    "monai/var-auto-encoder": Architecture(
        lambda: monai().VarAutoEncoder(3, (1, 20, 12, 28), 1, 5, (4, 8), (2, 2)), (1, 1, 20, 12, 28), local=False),
    "monai/flexible-unet": Architecture(
        lambda: monai().FlexibleUNet(1, 2, "efficientnet-b0", decoder_channels=(16, 12, 8, 8, 4)), (1, 1, 96, 64)),
    "monai/med-next": Architecture(
        lambda: monai().MedNeXt(3, 4, 1, 2, kernel_size=3, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1)),
        (1, 1, 20, 12, 28), (1, 1, 12, 20, 20)),
    "monai/med-next-grn": Architecture(
        lambda: monai().MedNeXt(2, 4, 1, 2, kernel_size=5, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1),
                                use_residual_connection=True, global_resp_norm=True), (1, 1, 44, 36), (1, 1, 28, 52)),
    "monai/quicknat": Architecture(  # its max unpools scatter over flat positions
        lambda: monai().Quicknat(4, 1, 4, 3, se_block="CSE"), (1, 1, 48, 80), local=False),
    "monai/diffusion-unet": Architecture(_diffusion, (1, 1, 12, 20), (1, 1, 20, 12), local=False),
    "monai/autoencoder-kl": Architecture(lambda: _autoencoder_kl(False), (1, 1, 13, 18, 14), (1, 1, 18, 12, 20)),
    "monai/autoencoder-kl-attention": Architecture(
        lambda: _autoencoder_kl(True), (1, 1, 10, 14, 12), (1, 1, 14, 10, 10), local=False),
    # All positions become rows: two split axes into one.
    "monai/vq-vae": Architecture(_vqvae, (1, 1, 20, 12, 28), (1, 1, 12, 20, 20), local=False),
    "monai/patch-discriminator": Architecture(
        lambda: monai().PatchDiscriminator(3, 4, 1, num_layers_d=2), (1, 1, 33, 29, 35), (1, 1, 31, 37, 28)),
    "monai/generator": Architecture(
        lambda: monai().Generator((6,), (4, 5, 6), (4, 1), (2, 2), norm="batch"), (2, 6), local=False),
    "monai/discriminator": Architecture(
        lambda: monai().Discriminator((1, 17, 21, 13), (4, 4), (2, 2)), (1, 1, 17, 21, 13), local=False),
    "monai/daf3d": Architecture(lambda: monai().DAF3D(1, 2), (1, 1, 33, 37, 35)),
    "monai/vit-auto-enc": Architecture(
        lambda: monai().ViTAutoEnc(1, (32, 48), 16, 1, 4, 12, 16, 2, 3, spatial_dims=2), (1, 1, 32, 48), local=False),
    "monai/dints": Architecture(_dints, (1, 1, 16, 24, 16)),
    "nnunet/plain-conv-unet": Architecture(lambda: _plain_unet(3, False), (1, 1, 20, 12, 28), (1, 1, 12, 28, 20)),
    "nnunet/plain-conv-unet2d": Architecture(lambda: _plain_unet(2, False), (1, 1, 44, 60), (1, 1, 52, 36)),
    "nnunet/residual-encoder-unet": Architecture(lambda: _plain_unet(3, True), (1, 1, 20, 12, 28), (1, 1, 12, 28, 20)),
    "smp/unet": Architecture(lambda: smp().Unet("resnet18", encoder_weights=None), (1, 3, 96, 64), (1, 3, 64, 160)),
    "smp/unet-plus-plus": Architecture(
        lambda: smp().UnetPlusPlus("mobilenet_v2", encoder_weights=None), (1, 3, 96, 64), (1, 3, 64, 160)),
    "smp/fpn": Architecture(lambda: smp().FPN("mobilenet_v2", encoder_weights=None), (1, 3, 96, 64), (1, 3, 64, 160)),
    "smp/deeplab-v3-plus": Architecture(
        lambda: smp().DeepLabV3Plus("mobilenet_v2", encoder_weights=None), (1, 3, 96, 64), (1, 3, 64, 160)),
    "smp/pspnet": Architecture(  # pools to 1, 2, 3 and 6 cells, which the new exporter writes as gathers
        lambda: smp().PSPNet("mobilenet_v2", encoder_weights=None), (1, 3, 96, 64), local=False),
    "smp/linknet": Architecture(
        lambda: smp().Linknet("mobilenet_v2", encoder_weights=None), (1, 3, 96, 64), (1, 3, 64, 160)),
    "smp/manet": Architecture(
        lambda: smp().MAnet("mobilenet_v2", encoder_weights=None, decoder_channels=(32, 24, 16, 12, 8)),
        (1, 3, 96, 64), local=False),
    "smp/pan": Architecture(lambda: smp().PAN("mobilenet_v2", encoder_weights=None), (1, 3, 128, 192)),
    "smp/upernet": Architecture(
        lambda: smp().UPerNet("efficientnet-b0", encoder_weights=None, decoder_channels=32), (1, 3, 96, 64),
        local=False),
    "smp/segformer": Architecture(
        lambda: smp().Segformer("mit_b0", encoder_weights=None), (1, 3, 96, 64), local=False),
    **{f"timm/{name}": Architecture(
        lambda name=name: timm(name), (1, 3, 97, 71), (1, 3, 79, 103), local=False)
        for name in ("convnext_atto", "convnextv2_atto", "efficientnet_lite0", "mobilenetv3_small_050", "resnet10t",
                     "regnetx_002", "ghostnet_100", "test_nfnet", "starnet_s1", "repvgg_a0")},
    "timm/hrnet_w18_small": Architecture(lambda: timm("hrnet_w18_small"), (1, 3, 96, 64), local=False),
    "timm/resnet10t-features": Architecture(lambda: timm("resnet10t", features=True), (1, 3, 97, 71), (1, 3, 79, 103)),
    "timm/poolformer_s12": Architecture(lambda: timm("poolformer_s12"), (1, 3, 96, 64), local=False),
    "timm/mobilevit_xxs": Architecture(lambda: timm("mobilevit_xxs"), (1, 3, 96, 64), local=False),
    "timm/edgenext_xx_small": Architecture(lambda: timm("edgenext_xx_small"), (1, 3, 96, 64), local=False),
    "timm/test_vit": Architecture(lambda: timm("test_vit"), (1, 3, 160, 160), local=False),
    "timm/swin": Architecture(_swin2d, (1, 3, 56, 84), local=False),
    "torch/edsr": Architecture(own.EDSR, (1, 3, 23, 17), (1, 3, 19, 29)),
    "torch/espcn": Architecture(own.espcn, (1, 1, 23, 17), (1, 1, 19, 29)),
    "torch/espcn3d": Architecture(own.espcn3d, (1, 1, 11, 7, 9), (1, 1, 7, 13, 11)),
    "torch/fsrcnn": Architecture(own.fsrcnn, (1, 1, 23, 17), (1, 1, 19, 29)),
    "torch/rrdbnet": Architecture(own.RRDBNet, (1, 3, 23, 17), (1, 3, 19, 29)),
    "torch/dncnn": Architecture(own.dncnn, (1, 1, 23, 17), (1, 1, 19, 29)),
    "torch/squeeze-excite1d": Architecture(lambda: own.SENetClassifier(1), (1, 1, 97), (2, 1, 83), local=False),
    "torch/squeeze-excite2d": Architecture(lambda: own.SENetClassifier(2), (1, 1, 41, 37), (2, 1, 33, 47), local=False),
    "torch/squeeze-excite3d": Architecture(
        lambda: own.SENetClassifier(3), (1, 1, 21, 17, 19), (1, 1, 15, 23, 17), local=False),
    "torch/conv-mixer": Architecture(own.conv_mixer, (1, 3, 41, 37), (1, 3, 33, 47), local=False),
    "torch/r2plus1d": Architecture(own.R2Plus1D, (1, 3, 9, 31, 27), (1, 3, 7, 25, 35), local=False),
    "torch/tcn": Architecture(own.TCN, (1, 1, 61), (1, 1, 83)),
    "torch/wavenet": Architecture(own.WaveNet, (1, 1, 61), (1, 1, 83)),
    "torch/conv-tasnet": Architecture(own.ConvTasNet, (1, 1, 208), (1, 1, 251)),
    "torch/nafnet": Architecture(own.NAFNet, (1, 3, 22, 30), (1, 3, 34, 18)),
    "torch/restormer": Architecture(own.restormer, (1, 3, 23, 17), (1, 3, 19, 29), local=False),
    "torch/non-local": Architecture(own.non_local, (1, 1, 11, 9, 13), (1, 1, 9, 15, 7), local=False),
    "torch/cbam": Architecture(own.cbam, (1, 3, 41, 37), (1, 3, 33, 47)),
    "torch/shuffle-net": Architecture(own.shuffle_net, (1, 3, 41, 37), (1, 3, 33, 47)),
    "torch/spatial-pyramid": Architecture(own.SPP, (1, 3, 41, 37), (1, 3, 33, 47)),
}
