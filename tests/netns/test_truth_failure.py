"""If processes cannot be followed, nothing is split: it fails loudly at the start (L21), and leaves nothing behind."""

import pytest

from tests.netns.stage import HOST, TUN, start_app
from tunsplit.lab.daemon import COMMAND, make_environment

pytestmark = pytest.mark.netns

CASES = {
    "without the capability to enter the initial network namespace": (
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"], 3, "missing CAP_SYS_ADMIN",
    ),
    "where /proc shows none": (
        ["unshare", "--pid", "--fork", "--mount-proc"], 4, "/proc shows another network namespace as the initial one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_without_process_events_it_does_not_start(lab, case):
    """L21: exit code, what is missing, and a host as it was; without the obstacle the same starts."""
    confined, code, words = CASES[case]
    program = lab.copy_program("python", "excluded")
    config = lab.config([program])
    file, socket = lab.write_config(config)
    show = ["sh", "-c", "ip -4 rule; ip -6 rule; ip -o link | cut -d: -f2; nft list ruleset"]
    before = (await lab.host.run(show)).stdout
    argv = [*confined, *COMMAND, "run", "-c", file]
    done = await lab.host.run(argv, env=make_environment(file, socket), check=False)

    assert (code, "") == (done.returncode, done.stdout)
    assert words in done.stderr
    assert 1 == len(done.stderr.splitlines())
    assert before == (await lab.host.run(show)).stdout
    async with start_app(lab.host, program) as app:
        assert str(HOST[4]) == await app("ask('tcp', SERVER4)")
    async with lab.tunsplit(config):
        assert TUN in (await lab.host.run(show)).stdout
