"""torchvision's FCN on ResNet-50, with its auxiliary head."""

from torch import Tensor, nn
from torchvision.models.segmentation import fcn_resnet50 as torchvision_fcn

from models.fcn.network import check_size, enlarged

__all__ = ["FCNResNet50"]


class FCNResNet50(nn.Module):
    """Dilated ResNet-50 whose stride is 8, and two heads; the keys are those of torchvision's ``fcn_resnet50``.

    Args:
        num_classes: K, background included.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        whole = torchvision_fcn(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True)
        self.backbone, self.classifier, self.aux_classifier = whole.backbone, whole.classifier, whole.aux_classifier

    def forward(self, images_N3HW: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Class scores of every pixel; in training those of the auxiliary head, too.

        Args:
            images_N3HW: float, height and width of at least 32.

        Returns:
            ``logits_NKHW`` of the images' size, once or twice.

        Raises:
            ValueError: if the images are smaller than 32 pixels.
        """
        height, width = images_N3HW.shape[-2:]
        check_size(height, width)
        maps = self.backbone(images_N3HW)
        logits_NKHW = enlarged(self.classifier(maps["out"]), height, width)
        if not self.training:
            return logits_NKHW
        return logits_NKHW, enlarged(self.aux_classifier(maps["aux"]), height, width)
