"""All targets, by name."""

from tests.fuzz import kernel, names, packets, texts
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {**packets.TARGETS, **names.TARGETS, **kernel.TARGETS, **texts.TARGETS}
