"""Do concepts compose on a real language model, whose base has never seen such data? SmolLM2-135M-Instruct.

    python -m examples.reviews.real_base --output_dir smollm2
    python -m examples.reviews.smollm2 --data_dir movie_reviews --base smollm2 --output_dir smollm2-compare

Film reviews as chats, in concepts made by rewriting (`chats.py`): emoji, pirate, shout, or with `--world graded` brief,
emoji, formal, shout. The model's own reviews are essays; the data are lines in lower case. Every set has 600 rows, and
only the oracle is trained on pairs. All methods have the same rank per concept, number of steps, learning rate and
schedule, and see as many rows of each set, two in a step on average. (Ours begins with steps on the observational set
alone, so its concepts see fewer rows than the LoRAs.)

Measured per context: the share of samples that show all its concepts, and of those that are one line as in the data
(the task), which rules tell exactly; the share in which classifiers find all, which have seen true reviews of every
context; their perplexity under the untouched base; and the perplexity of true reviews of 60 held-out sentences. For our
adapter and a+b-obs also the share that shows a concept at strengths between 0 and 1.

Every training and every method has files of its own in --output_dir, so that the same command goes on after an
interruption, and other --methods join the table.
"""

import argparse
import json
import time
from pathlib import Path

from hf_causal_context._files import complete_or_absent

from ..worlds.reviews import read_sentences
from .chats import WORLDS
from .smollm2_measures import Ruler, table
from .smollm2_methods import Study
from .smollm2_peers import METHODS

ROWS_PER_SET = 600
HELD_OUT = 60  # sentences of true reviews
WITH_STRENGTHS = ("adapter", "a+b-obs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--base", type=Path, default=Path("smollm2"))
    parser.add_argument("--output_dir", type=Path, default=Path("smollm2-compare"))
    parser.add_argument("--world", choices=WORLDS, default="styles", help="of concepts")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--max_steps", type=int, default=110)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8, help="of each concept, and of each LoRA")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--num_samples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("methods", "output_dir")}
    if options.world == "styles":
        del settings["world"]  # as results of before there were others have it
    noted = options.output_dir / "settings.json"
    if noted.exists() and (before := json.loads(noted.read_text())) != settings:
        parser.error(f"{options.output_dir} was made with {before}, not {settings}. Choose another --output_dir.")
    noted.write_text(json.dumps(settings, indent=1) + "\n")
    world = WORLDS[options.world]
    sentences = world.usable(read_sentences(options.data_dir))
    study = Study(
        base=options.base,
        folder=options.output_dir / "trained",
        sentences=sentences[:-HELD_OUT][:ROWS_PER_SET],
        world=world,
        steps=options.max_steps,
        learning_rate=options.learning_rate,
        rank=options.rank,
        mixed_precision=options.mixed_precision,
        seed=options.seed,
    )
    ruler = Ruler(study, sentences[-HELD_OUT:], study.load_base().eval(), options.num_samples)
    results = {}
    for name, prepare in METHODS.items():
        done = options.output_dir / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        if not done.exists():
            if name not in options.methods:
                continue
            start = time.perf_counter()
            method = prepare(study)
            seconds = {"train": time.perf_counter() - start}
            measured = ruler.measure(method)
            if name in WITH_STRENGTHS:
                measured["strengths"] = ruler.response(method)
            seconds["measure"] = time.perf_counter() - start - seconds["train"]
            with complete_or_absent(done) as unfinished:
                unfinished.write_text(json.dumps({"results": measured, "seconds": seconds}, indent=1) + "\n")
            print(f"{name}: {seconds}", flush=True)
        results[name] = json.loads(done.read_text())["results"]
    text = f"{ruler.accuracy()}\n\n{table(results, world, options.num_samples)}"
    print("\n" + text)
    with complete_or_absent(options.output_dir / "results.md") as unfinished:
        unfinished.write_text(text + "\n")


if __name__ == "__main__":
    main()
