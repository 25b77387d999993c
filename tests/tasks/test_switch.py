"""A reload that fails halfway."""

import pytest

from tests.fakes.judges import FakeJudge, as_real, policy
from tunsplit.config import Config, parse
from tunsplit.errors import KernelError
from tunsplit.tasks.switch import Switch

CONFIG = '[tunnel]\ninterface = "wg0"\nfwmark = 51820\n'


class Judge(FakeJudge):
    """With nothing in its tree."""

    @property
    def tree(self) -> "Judge":
        return self

    def lineage(self, *_: object) -> list[object]:
        return []

    def changed(self) -> None:
        pass

    def set_policy(self, _: object) -> None:
        pass

    def save_now(self) -> None:
        pass


class Others:
    """The other organs: content with everything, but for the network, which cannot be steered."""

    def hold_for(self, _: float) -> None:
        pass

    def rejudge_all(self) -> None:
        pass

    def refuse_covering(self, *_: object) -> None:
        pass

    def steer(self, _: object) -> None:
        raise KernelError("nft: no memory")


def test_where_steering_fails_dns_follows_all_the_same(tmp_path):
    """Both sides are closed then; when they come back, it must not be with the table of the configuration before."""
    file = tmp_path / "tunsplit.toml"
    told: list[Config] = []
    file.write_text(CONFIG)
    others = as_real(Others())
    switch = Switch(
        parse(CONFIG, str(file)), str(file), judge=as_real(Judge(policy())), live=others, admit=others,
        explainer=others, processes=others, network=others, resolvers=others,
    )  # fmt: skip
    switch.on_config = told.append
    file.write_text(f'{CONFIG}[dns]\nplatform = "android"\n')

    with pytest.raises(KernelError, match="nft: no memory"):
        switch.reload()

    assert ["android"] == [config.dns.platform for config in told]
    assert [switch.config] == told
