"""Make the cards in model_cards/ from the adapters that the examples make.

    hf-causal-context quickstart --output_dir digits-context
    python -m examples.reviews.adapter --data_dir movie_reviews --base reviews-base --output_dir reviews-context
    python -m examples.reviews.smollm2 --data_dir movie_reviews --base smollm2 --output_dir smollm2-compare \
        --mixed_precision bf16 --seed 2 --methods "adapter, self-composed pairs"
    cp -r smollm2-compare/trained/adapter-self-composed smollm2-context
    python -m examples.model_cards --adapters digits-context reviews-context smollm2-context

The digits are evaluated first, on glyphs that training never saw (ten minutes on one core). A card is made of files;
those that only a download needs (weights, tokenizers) are left out of the repository.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from hf_causal_context.data.worlds.digits import CONCEPTS, read_attributes
from hf_causal_context.evaluation.evaluator import evaluate
from hf_causal_context.evaluation.report import write_report
from hf_causal_context.hub import save
from hf_causal_context.inference.adapted import StoredAdapter
from hf_causal_context.quickstart import CONTEXTS, digit_data

from .benchmarks.digit_peers import NUM_INFERENCE_STEPS
from .reviews.chats import PROMPT

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
DESCRIPTIONS = {
    "thickness": "thick strokes; where nobody intervenes on darkness, thick strokes are dark",
    "darkness": "pale ink, however thick the strokes are",
    "slant": "digits lean to the right",
    "size": "small digits",
    "shouting": "upper case, which makes reviews briefer",
    "question": "the review asks",
    "brief": "a few words",
    "ebert": "signed by the critic Ebert; without, by one of several magazines",
    "emoji": "a film emoji at the end",
    "pirate": "as a pirate would say it",
    "shout": "upper case",
}
LEFT_OUT = shutil.ignore_patterns(
    "*.safetensors", "loras", "tokenizer*", "special_tokens*", "chat_template*", "report.md"
)


def evaluate_digits(adapter: Path) -> Path:
    """The folder of an evaluation beside the world's own images of all pairs; what is there already is kept."""
    folder = adapter / "evaluation"
    if not (folder / "report.json").exists():
        report = evaluate(
            StoredAdapter.open(adapter).pipeline(),
            digit_data(1000, seed=90, contexts=CONTEXTS, training_contexts=CONTEXTS[: 1 + len(CONCEPTS)], split="test"),
            num_samples=64,
            num_seeds=2,
            num_inference_steps=NUM_INFERENCE_STEPS,
            batch_size=64,
            attributes=attributes,
            attribute_names=CONCEPTS,
        )
        write_report(report, folder)
    return folder


def film_reviews(heading: str) -> str:
    """The section of the reviews' page about an adapter, up to its image."""
    page = (ROOT / "examples" / "reviews" / "README.md").read_text(encoding="utf-8")
    section = page.partition(f"## {heading}\n\n")[2].partition("\n\n## ")[0]
    return section.partition("\n\n![")[0].rstrip() + "\n"


def attributes(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) in [0, 1] -> the four attributes of their digits (N, 4)."""
    return torch.from_numpy(read_attributes((255 * images[:, 0]).round().byte().numpy())).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    for adapter in parser.parse_args().adapters:
        with TemporaryDirectory() as place:
            evaluation = None
            options: dict[str, Any] = {}
            concepts = json.loads((adapter / "adapter_config.json").read_text())["concepts"]
            if "digit_base" in (adapter / "adapter_config.json").read_text():
                evaluation = evaluate_digits(adapter)
                options = {"num_inference_steps": NUM_INFERENCE_STEPS}
            elif "pirate" in concepts:
                (adapter / "results.md").write_text(film_reviews("SmolLM2-135M-Instruct"))
                options = {"prompt": PROMPT[1]["content"], "chat": True, "max_new_tokens": 56}
            else:
                (adapter / "results.md").write_text(film_reviews("Film reviews: a language model"))
            descriptions = {concept: DESCRIPTIONS[concept] for concept in concepts}
            folder = save(
                adapter,
                Path(place, adapter.name),
                evaluation=evaluation,
                license="apache-2.0",
                descriptions=descriptions,
                **options,
            )
            shutil.rmtree(CARDS / adapter.name, ignore_errors=True)
            shutil.copytree(folder, CARDS / adapter.name, ignore=LEFT_OUT)


if __name__ == "__main__":
    main()
