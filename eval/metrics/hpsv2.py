"""Human Preference Score v2 (Wu et al. 2023): OpenCLIP ViT-H/14 tuned on HPDv2, versions 2.0 and 2.1."""

import open_clip

from common.errors import UserError
from eval.metrics.base import OTHER_FILE, weight_file
from eval.metrics.clip import OpenCLIPMetric
from models.weights import load_strictly, read_torch_file


class HPSv2(OpenCLIPMetric):
    """Cosine of text and image embeddings, without the logit scale (about 0.27).

    `checkpoint` is a hub repository or folder that holds the published file, or such a file (weights under
    `state_dict`).
    """

    filename = "HPS_v2_compressed.pt"

    def __init__(self, device: str = "cpu", architecture: str = "ViT-H-14", checkpoint: str = "xswu/HPSv2",
                 image_size: int = 224) -> None:
        super().__init__(device, architecture, image_size)
        path = weight_file(checkpoint, self.filename)
        content = read_torch_file(path)
        if not isinstance(content, dict) or "state_dict" not in content:
            raise UserError(f"{path} holds no state_dict: it is not one of HPSv2's checkpoints")
        model = open_clip.CLIP(**open_clip.get_model_config(self.architecture))
        load_strictly(model, content["state_dict"], path, OTHER_FILE)
        self._use(model)


class HPSv21(HPSv2):
    """The 2.1 release of the weights."""

    filename = "HPS_v2.1_compressed.pt"
