"""A score like VQAScore (Lin et al., ECCV 2024, arXiv 2404.01291): the probability that a model answers "yes".

The model answers questions about images: any generative one of transformers, for example BLIP-VQA, BLIP-2, InstructBLIP
or a chat model with images. VQAScore itself uses CLIP-FlanT5, which is not part of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfusion.errors import ModelNotFoundError
from dfusion.rewards.checks import check_images, checked_scores
from dfusion.rewards.weights import folder_digest, load_pretrained, load_processor, weights_folder

ANSWERS = ("yes", "Yes")


class VqaScorer:
    """P("yes") of the first token of the answer, in [0, 1]. Images are asked about one by one, without padding."""

    def __init__(self, source: str, *, question: str, name: str = "vqa", device: str = "cpu") -> None:
        """Load a model that answers questions.

        Args:
            source: Its folder, or "owner/name@commit". `architectures` of its config names its class.
            question: The question, with {} for the prompt.
            name: The name of the scorer.
            device: The device of the model.

        Raises:
            ModelNotFoundError: There is no such model, it is a pickle, or "yes" is not one of its tokens.
        """
        import transformers

        folder = weights_folder(source)
        config = load_processor(transformers.AutoConfig, folder)
        architecture = next(iter(config.architectures or ()), "")
        model_class = getattr(transformers, architecture, None)
        if not hasattr(model_class, "generate"):
            raise ModelNotFoundError(
                f"{folder}: expected a model of transformers that answers questions, got {architecture!r}"
            )

        self.name = name
        self.version = folder_digest(folder)
        self._model = load_pretrained(model_class, folder, device)
        self._processor = load_processor(transformers.AutoProcessor, folder)
        self._question = question
        self._device = device
        self._yes = self._answer_tokens()

    def _answer_tokens(self) -> list[int]:
        tokens = set()
        for answer in ANSWERS:
            ids = self._processor.tokenizer(answer, add_special_tokens=False).input_ids
            if len(ids) == 1 and ids[0] != self._processor.tokenizer.unk_token_id:
                tokens.add(int(ids[0]))
        if not tokens:
            raise ModelNotFoundError(f'{self.name}: expected a model with a token for "yes", got none')
        return sorted(tokens)

    @torch.no_grad()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> list[float]:
        """P("yes") for each image (B, H, W, 3) uint8. Raises ShapeMismatchError, NonFiniteError."""
        check_images(images, prompts)
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            inputs = self._inputs(Image.fromarray(image), self._question.replace("{}", prompt))
            answer = self._model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            scores.append(float(answer.logits[0][0].float().softmax(-1)[self._yes].sum()))
        return checked_scores(self.name, scores, prompts)

    def _inputs(self, picture: Image.Image, question: str) -> Any:
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            message = {"role": "user", "content": content}
            question = self._processor.apply_chat_template([message], add_generation_prompt=True)
        return self._processor(images=picture, text=question, return_tensors="pt").to(self._device)
