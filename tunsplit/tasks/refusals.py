"""What was refused lately: it is refused again without a new judgement, and users are told of it."""

from collections import OrderedDict
from dataclasses import dataclass

from tunsplit.engine.attribution import Attribution
from tunsplit.engine.flow import App, Flow

REFUSED_S = 2.0  # for how long a refusal is repeated
MOST_REFUSED = 4096

Key = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A flow that was refused, and why."""

    protocol: int
    key: bytes
    since: float
    reason: str
    attribution: str
    app: App | None
    cookie: bytes | None  # of its socket, where that is known

    @classmethod
    def of(cls, key: Key, now: float, reason: str, attribution: Attribution | None) -> "Refusal":
        """The refusal of a flow that was never open; None: nobody looked for its owner."""
        if attribution is None:
            return cls(*key, now, reason, "", None, None)
        return cls(*key, now, reason, attribution.certainty.value, App.of(attribution), attribution.cookie)

    @classmethod
    def of_flow(cls, flow: Flow, now: float, reason: str) -> "Refusal":
        """The refusal of the late packets of a flow that was ended."""
        return cls(flow.protocol, flow.key, now, reason, flow.attribution, flow.app, flow.cookie)


class Refusals(OrderedDict[Key, Refusal]):
    """By protocol and four-tuple, the latest last; bounded."""

    def remember(self, refusal: Refusal) -> None:
        """Add one; the oldest is forgotten for it if need be."""
        key = (refusal.protocol, refusal.key)
        self[key] = refusal
        self.move_to_end(key)
        if len(self) > MOST_REFUSED:
            self.popitem(last=False)
