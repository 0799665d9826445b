"""Scores of a picture for a prompt, by any dual encoder that `transformers` loads from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor


class DualEncoder:
    """A text and an image encoder with a common space (CLIP, SigLIP, PickScore, ...).

    Args:
        folder: what `save_pretrained` wrote: weights, configuration, tokenizer and image processor.
        clipscore: 100 * max(cosine, 0) (Hessel et al. 2021, in the paper's scale). Else the model's own logit, which is
            how preference models such as PickScore are used: cosine * exp(logit_scale) (+ logit_bias).
    """

    def __init__(self, folder: Path, clipscore: bool, device: str = "cpu") -> None:
        self.clipscore, self.device = clipscore, device
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "logit_scale"):
            raise ValueError(
                f"{folder} holds a {type(self.model).__name__}, which does not put texts and images into one space: "
                "give the folder of a CLIP-like model"
            )
        config = self.model.config
        self.length = getattr(config, "text_config", config).max_position_embeddings

    @torch.no_grad()
    def score(self, prompts: Sequence[str], files: Sequence[Path]) -> list[float]:
        """One number per pair; going higher fits better. Texts beyond the encoder's length are cut off."""
        images = [Image.open(file).convert("RGB") for file in files]
        inputs = self.processor(
            text=list(prompts),
            images=images,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.length,
        ).to(self.device)
        outputs = self.model(**inputs)
        cosine = torch.cosine_similarity(outputs.text_embeds, outputs.image_embeds)
        if self.clipscore:
            return (100 * cosine.clamp(min=0)).tolist()
        bias = getattr(self.model, "logit_bias", None)
        return (cosine * self.model.logit_scale.exp() + (0 if bias is None else bias)).flatten().tolist()
