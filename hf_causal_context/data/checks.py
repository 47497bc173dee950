"""Checks of interventional data before training: what is there, what is missing, what would spoil the result."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import PIL.Image
from datasets import Image, IterableDataset

from ..contexts import Context
from ..errors import UserError, UserValueError
from ..media.pixels import plain, remarks, upright_size
from ..media.videos import frames
from ..messages.progress import ProgressBar
from ..messages.wording import quoted
from .columns import BATCH_ROWS, Rows, known_features
from .interventional import InterventionalData
from .look_alikes import LookAlikes, Place, examples, same
from .masks import check_mask
from .pairs import Partners
from .sizes import Sizes
from .stored import stored_bytes
from .text_rows import columns_of, is_answered, row_problem

TINY = 50
LOPSIDED = 10
MAX_STRENGTHS = 12
LARGE_STRENGTH = 3
STREAM_ROWS = 200
COINCIDENCES = 0.01  # of held-out texts, that may be trained on too

TRAIN = "train"
HELD_OUT = "held out"


@dataclass(frozen=True)
class ContextCount:
    """How many rows a context has, and whether they are trained on ("train") or not ("held out").

    `paired`: how many of them have a partner, of the observational ones how many are one; None in data without pairs.
    """

    context: str
    role: str
    count: int
    paired: int | None = None


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found; the digest is of what is trained on, in its order, as far as that was read."""

    rows: tuple[ContextCount, ...]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    digest: str

    def table(self) -> str:
        """Contexts and counts, then errors and warnings, as text."""
        cells = [("context", "role", "rows", "in pairs")]
        cells += [
            (row.context or "(observational)", row.role, str(row.count), "" if row.paired is None else str(row.paired))
            for row in self.rows
        ]
        if all(row.paired is None for row in self.rows):
            cells = [(*row[:3], "") for row in cells]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = [
            f"{name:<{widths[0]}}  {part:<{widths[1]}}  {count:>{widths[2]}}  {paired:>{widths[3]}}".rstrip()
            for name, part, count, paired in cells
        ]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([*lines, self.remarks()]).rstrip("\n")

    def remarks(self) -> str:
        """Errors and warnings, as text."""
        lines = [f"ERROR    {message}" for message in self.errors]
        return "\n".join([*lines, *(f"WARNING  {message}" for message in self.warnings)])

    def raise_for_errors(self) -> None:
        """Raise what was found to be wrong, if anything.

        Raises:
            ValueError: with all errors.
        """
        if self.errors:
            raise UserValueError(
                "The data cannot be trained on:\n" + "\n".join(f"- {message}" for message in self.errors)
            )


def check_data(data: InterventionalData, *, decode: bool = True, num_frames: int | None = None) -> DataReport:
    """Count the rows per context, read and compare all images or texts, and say what is wrong and how to mend it.

    `decode=False` reads and compares the files but does not open them as images. Texts are the same where the
    whole row is: one prompt may have several completions. Of streaming data the first `STREAM_ROWS` rows of each
    context are checked. Of videos the first `num_frames` frames are decoded, or the first one.
    """
    seen = _Seen(columns_of(data.content_column), "videos" if data.has_videos else "images")
    num_decoded = (num_frames or 1) if decode else 0
    train = _read(data, data.rows, data.contexts, TRAIN, num_decoded, seen)
    held_out = Counter[str]()
    for context, rows in data.held_out.items():
        held_out[context] = _read(data, rows, (context,), HELD_OUT, num_decoded, seen).total()
    errors = [*_structure_errors(data, train, seen.noun), *_content_errors(seen)]
    if data.has_pairs:
        errors += seen.partners.errors(seen.noun)
    warnings = [*data.warnings, *_size_warnings(data, train)]
    warnings += [*_strength_warnings(data), *_duplicate_warnings(seen, train), *_image_warnings(seen)]
    warnings += [*_unanswered_warnings(seen), *(seen.partners.warnings(seen.noun) if data.has_pairs else ())]
    leaks = seen.leaks()
    if leaks:
        # Short texts coincide by chance, images do not.
        chance = bool(seen.texts) and len(leaks) <= COINCIDENCES * held_out.total()
        (warnings if chance else errors).append(
            f"{len(leaks)} held-out {seen.noun} are also trained on: {examples(same(leaks))}. Remove them from one "
            "of the two, else the evaluation measures memory."
        )
    if data.streaming:
        warnings.append(f"Streaming: only the first {STREAM_ROWS} rows of each context were checked.")
    counts = [(context, TRAIN, train[context]) for context in sorted({*data.contexts, *train})]
    counts += [(context, HELD_OUT, count) for context, count in sorted(held_out.items())]
    paired = seen.partners.count() if data.has_pairs else None
    table = (ContextCount(*row, None if paired is None else paired[row[0]]) for row in counts)
    return DataReport(tuple(table), tuple(errors), tuple(warnings), seen.trained.hexdigest())


def check_pairs(data: InterventionalData) -> None:
    """Refuse what `check_data` finds wrong with the pairs of data, without a look at anything else.

    Raises:
        ValueError: for data without pairs, or observational rows of one name.
    """
    partners = Partners()
    parts = [(data.rows, data.contexts, TRAIN), *((rows, (c,), HELD_OUT) for c, rows in data.held_out.items())]
    for rows, contexts, role in parts:
        for number, (context, (value, name)) in enumerate(
            _payloads(rows, [data.content_column, "pair"], contexts, role)
        ):
            source = value.get("path") if isinstance(value, dict) else None
            whole = f"{source or f'row {number} ({role})'} ({context or 'observational'})"
            partners.add(name, (role, context, whole), None)
    if errors := list(partners.errors("videos" if data.has_videos else "images")):
        raise UserValueError(" ".join(errors))


class _Seen:
    """What reading the rows showed: images, or the texts in the columns `texts`."""

    def __init__(self, texts: tuple[str, ...], otherwise: str) -> None:
        self.texts = texts
        self.noun = "texts" if texts else otherwise
        self.unreadable: list[str] = []
        self.unanswered: list[str] = []
        self.look_alikes = LookAlikes()
        self.partners = Partners()
        self.remarks: defaultdict[str, list[str]] = defaultdict(list)  # -> names of images
        # Digest of a row's content -> the first row with it; every later one adds a pair.
        self.first: dict[bytes, Place] = {}
        self.pairs: list[tuple[Place, Place]] = []
        self.again = Counter[tuple[str, str]]()  # role and context -> rows that are there already
        self.sizes = Sizes()
        self.trained = hashlib.blake2b(digest_size=16)

    def add(self, content: bytes, place: Place, image: PIL.Image.Image | None, beside: Sequence[str]) -> None:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if place[0] == TRAIN:
            self.trained.update(digest + repr((place[1], *beside)).encode())
        first = self.first.setdefault(digest, place)
        if first[:2] != place[:2]:
            self.pairs.append((first, place))
        elif first is not place:
            self.again[place[0], place[1]] += 1
        if image is not None:
            self.look_alikes.add(image, digest, place)
            if place[0] == TRAIN:
                self.sizes.add(place[1], upright_size(image))

    def leaks(self) -> list[tuple[Place, Place]]:
        """Pairs of which one row is trained on and the other held out."""
        return [pair for pair in self.pairs if {pair[0][0], pair[1][0]} == {TRAIN, HELD_OUT}]


def _read(
    data: InterventionalData, rows: Rows, contexts: Sequence[str], role: str, num_decoded: int, seen: _Seen
) -> Counter[str]:
    _, features = known_features(rows)
    opener = Image() if isinstance(features[data.content_column], Image) and num_decoded else None
    counts = Counter[str]()
    names = seen.texts or [data.content_column, *(name for name in ("mask", "pair", "caption") if name in features)]
    lines = {context: chain.from_iterable(file.names() for file in files) for context, files in data.files.items()}
    for context, values in _payloads(rows, names, contexts, role):
        value, columns = values[0], dict(zip(names, values, strict=True))
        source = value.get("path") if isinstance(value, dict) else next(lines.get(context, iter(())), None)
        row = f"row {counts[context]} of {repr(context) if context else 'the observational context'} ({role})"
        name, whole = (source, f"{source} ({context or 'observational'})") if source else (row, row)
        counts[context] += 1
        image = None
        # Decoders raise whatever they like, and a damaged file must not hide the others.
        try:
            if seen.texts:
                content = _text(columns)
                if not is_answered(columns):
                    seen.unanswered.append(name)
            else:
                content = stored_bytes(value)
            if columns.get("caption", "") is None:
                raise UserValueError("its caption is missing; write '' for an empty one")
            if data.has_videos and num_decoded and not sum(1 for _ in islice(frames(value), num_decoded)):
                raise UserValueError("the clip has no frames")
            if opener is not None:
                image = opener.decode_example({"bytes": content, "path": None})
                for remark in remarks(image):
                    seen.remarks[remark].append(name)
            beside = [columns.get("caption", ""), *([columns["pair"]] if data.has_pairs else [])]
            if columns.get("mask") is not None:
                mask = stored_bytes(columns["mask"])
                beside.append(hashlib.blake2b(mask, digest_size=16).hexdigest())
                if image is not None:
                    check_mask(mask, image)
            seen.add(content, (role, context, whole), image, beside)
            if data.has_pairs:
                size = None if image is None else plain(image).size
                seen.partners.add(columns["pair"], (role, context, whole), size)
        except Exception as error:
            seen.unreadable.append(
                f"{name} ({error if seen.texts or isinstance(error, UserError) else type(error).__name__})"
            )
    return counts


def _payloads(
    rows: Rows, names: Sequence[str], contexts: Sequence[str], role: str
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    if isinstance(rows, IterableDataset):
        yield from _first_of_stream(rows, names, contexts)
        return
    columns = rows.with_format(None).select_columns([*names, "context"])
    for name in names:
        if isinstance(columns.features[name], Image):
            columns = columns.cast_column(name, Image(decode=False))
    with ProgressBar(total=len(rows), desc=f"Checking ({role})", unit="row") as progress:
        for batch in columns.iter(BATCH_ROWS):
            assert isinstance(batch, dict)
            for context, *values in zip(batch["context"], *(batch[name] for name in names), strict=True):
                yield context, tuple(values)
                progress.update()


def _first_of_stream(
    rows: IterableDataset, names: Sequence[str], contexts: Sequence[str]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    left = dict.fromkeys(contexts, STREAM_ROWS)
    _, features = known_features(rows)
    # Images stay files, while JSON in texts must be read.
    images = any(isinstance(features[name], Image) for name in names)
    for row in rows.decode(False) if images else rows:
        context = row["context"]
        if left.get(context, 0) > 0:
            left[context] -= 1
            yield context, tuple(row[name] for name in names)
        if not any(left.values()):
            return


def _text(row: Mapping[str, Any]) -> bytes:
    if problem := row_problem(row):
        raise UserValueError(problem)
    return json.dumps(row).encode()


def _structure_errors(data: InterventionalData, train: Counter[str], noun: str) -> Iterator[str]:
    if not train[""]:
        yield (
            "There is no observational set, and every intervention is learned against it: without it the observational "
            "part, which holds what all your data differs from the base by, could not be told from the concepts. Each "
            f"would learn that difference, and combinations would add it up. Add {noun} in which nothing was "
            f"intervened on: the folder 'obs', or rows with the context 'obs' or ''.{_held_out(data, [''])}"
        )
    single = {targets[0] for context in train if len(targets := Context.parse(context).targets) == 1}
    if missing := [name for name in data.concepts if name not in single]:
        yield (
            f"No set for {quoted(missing)} alone. Every concept needs one in which only it was intervened on, else it "
            "is not identifiable. Add the set, or remove the concept from concepts=."
            + _held_out(data, [str(Context(name)) for name in missing])
        )
    if both := sorted(set(data.held_out) & set(train)):
        yield f"Held-out contexts are among the training rows: {quoted(both)}. Remove these rows from one of the two."


def _held_out(data: InterventionalData, contexts: Sequence[str]) -> str:
    """Say which of the contexts that are missing are there, but not trained on."""
    there = quoted(context or "obs" for context in contexts if context in data.held_out)
    if not there:
        return ""
    return f" There are rows of {there}, which are held out: see training_contexts= and held_out_contexts=."


def _content_errors(seen: _Seen) -> Iterator[str]:
    if seen.unreadable:
        wrong, remedy = ("are no training data", "Correct") if seen.texts else ("cannot be read", "Replace")
        yield f"{len(seen.unreadable)} {seen.noun} {wrong}: {examples(seen.unreadable)}. {remedy} or remove them."


def _size_warnings(data: InterventionalData, train: Counter[str]) -> Iterator[str]:
    counts = data.counts or {}
    sizes = Counter[str]()
    for context in data.contexts:  # rows at any strength teach the same concepts
        sizes["+".join(Context.parse(context).targets) or "(observational)"] += counts.get(context, train[context])
    if tiny := [f"{context} ({count})" for context, count in sizes.items() if 0 < count < TINY]:
        yield f"Fewer than {TINY} rows in {', '.join(tiny)}. The adapter may learn these by heart; add rows."
    filled = {context: count for context, count in sizes.items() if count}
    if filled and max(filled.values()) > LOPSIDED * min(filled.values()):
        small, large = min(filled, key=filled.__getitem__), max(filled, key=filled.__getitem__)
        yield (
            f"Lopsided sets: {large} has {filled[large]} rows, {small} only {filled[small]}. Sampling balances the "
            f"contexts, so rows of {small} repeat {filled[large] / filled[small]:.0f} times as often; add rows."
        )


def _strength_warnings(data: InterventionalData) -> Iterator[str]:
    strengths = defaultdict[str, set[float]](set)
    for context in map(Context.parse, data.contexts):
        if len(context.targets) == 1:
            strengths[context.targets[0]].update(context.strengths.values())
    for name, found in strengths.items():
        listed = ", ".join(f"{strength:g}" for strength in sorted(found)[:MAX_STRENGTHS])
        if len(found) > MAX_STRENGTHS:
            yield (
                f"{name!r} has rows at {len(found)} strengths. Losses and evaluations are per strength, of few rows "
                "each: round them, for example to quarters."
            )
        if 1 not in found:
            yield (
                f"No rows of {name!r} at strength 1, only at {listed}. Its bare name means 1, in samples, evaluations "
                "and reweighting, and 1 is then a guess. Divide the strengths, so that the full effect is 1"
                + (f": call these rows {name!r}." if len(found) == 1 else ".")
            )
        elif max(map(abs, found)) > LARGE_STRENGTH:
            yield (
                f"{name!r} has rows at the strengths {listed}: 1 is meant to be the full effect, and others multiples "
                "of it. Divide them by the largest."
            )


def _duplicate_warnings(seen: _Seen, train: Counter[str]) -> Iterator[str]:
    twice = [pair for pair in seen.pairs if pair[0][0] == pair[1][0]]
    if twice:
        yield (
            f"{len(twice)} {seen.noun} are in two contexts: {examples(same(twice))}. What was intervened on is then "
            "ambiguous; keep each in one."
        )
    again = {context: number for (role, context), number in seen.again.items() if role == TRAIN}
    if again:
        listed = ", ".join(f"{n} of {train[c]} of {c or '(observational)'}" for c, n in sorted(again.items()))
        yield (
            f"Some {seen.noun} are there more than once, and weigh that much more: {listed}. Remove them, unless that "
            "is meant."
        )


def _image_warnings(seen: _Seen) -> Iterator[str]:
    if alike := seen.look_alikes.pairs():
        yield (
            f"{len(alike)} images look like one of another context: {examples(same(alike))}. Look at them: small "
            "edits are right; edits that did nothing, and copies, spoil what is learned."
        )
    for remark, names in seen.remarks.items():
        yield f"{len(names)} images ({examples(names)}) {remark}"
    yield from seen.sizes.warnings()


def _unanswered_warnings(seen: _Seen) -> Iterator[str]:
    if seen.unanswered:
        yield (
            f"{len(seen.unanswered)} texts have no message of the assistant: {examples(seen.unanswered)}. Training "
            "learns what others say in them, or stops at them where it learns answers only. Add the answers, or remove "
            "the texts."
        )
