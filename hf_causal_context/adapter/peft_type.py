"""The member CAUSAL_CONTEXT of PEFT's enum of methods, and the prefixes of weights' names."""

from __future__ import annotations

from typing import cast

from peft.utils import PeftType

PEFT_PREFIX = "base_model.model."

NAME = "causal_context"


PREFIX = NAME + "_"  # transformers assumes that the prefix is the type's name in lower case


def extend_peft_types() -> PeftType:
    """Add the member CAUSAL_CONTEXT to PEFT's enum of methods and return it.

    PEFT accepts a plain string in its mappings, but transformers and diffusers ask a type for its `.value`.
    """
    name = NAME.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    order = len(PeftType)
    for attribute, value in (("_name_", name), ("_value_", name), ("__objclass__", PeftType), ("_sort_order_", order)):
        setattr(member, attribute, value)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return cast(PeftType, member)


CAUSAL_CONTEXT = extend_peft_types()
