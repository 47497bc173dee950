"""Four concepts of text in one adapter: trained on single interventions, then asked for pairs that nobody wrote.

    python -m examples.reviews.base --data_dir movie_reviews --output_dir reviews-base
    python -m examples.reviews.adapter --data_dir movie_reviews --base reviews-base --output_dir reviews-context

Four minutes on two CPU cores, after five for the base. Writes the adapter, its card and samples, the perplexity of true
pairs in the log, and layers.png: which layers carry which concept.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from hf_causal_context import Context, causal_effects
from hf_causal_context.data import texts_from_dataset
from hf_causal_context.inference.texts import generate_texts
from hf_causal_context.training.language import train_text

from ..worlds.reviews import CONCEPTS, read_sentences, write_reviews
from .base import CONTEXTS, HELD_OUT_SENTENCES, PAIRS, SINGLES, adapter_arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--base", default="reviews-base")
    parser.add_argument("--output_dir", default="reviews-context")
    parser.add_argument("--max_steps", type=int, default=400)
    options = parser.parse_args()

    sentences = read_sentences(options.data_dir)
    seen, unseen = sentences[:-HELD_OUT_SENTENCES], sentences[-HELD_OUT_SENTENCES:]
    sets = {
        context: write_reviews(seen, len(seen), context, 10 + i)[0] for i, context in enumerate([Context(), *SINGLES])
    }
    # Pairs are held out by themselves: only their perplexity is measured, on sentences that no set has.
    sets |= {context: write_reviews(unseen, len(unseen), context, 50 + i)[0] for i, context in enumerate(PAIRS)}
    columns = {
        "text": [text for texts in sets.values() for text in texts],
        "context": [str(context) for context, texts in sets.items() for _ in texts],
    }
    arguments = adapter_arguments(
        options.base,
        options.output_dir,
        options.max_steps,
        reweighted_contexts=["pairs"],
        report_to="tensorboard",
        resume_from_checkpoint="latest",  # so that the same command goes on after an interruption
    )
    train_text(arguments, data=texts_from_dataset(Dataset.from_dict(columns), concepts=CONCEPTS))

    model = AutoPeftModelForCausalLM.from_pretrained(options.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.output_dir)
    [texts] = generate_texts(model, tokenizer, [""], CONTEXTS, max_new_tokens=60, seed=0)
    for context, text in zip(CONTEXTS, texts, strict=True):
        print(f"{str(context) or 'obs':<18} {text}")
    causal_effects(model).plot_layers(Path(options.output_dir, "layers.png"))


if __name__ == "__main__":
    main()
