"""What attribution relies on from Linux."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from dpkt import ip, tcp

from tests.apps import CAT, FAR4, OWN4, TUN, connecting, copy_of_cat, flow, inode, key, running_apps, udp
from tunsplit.kernel.sockdiag import LISTEN, SYN_RECV, SYN_SENT

pytestmark = pytest.mark.netns

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
NOBODY = 65534


@pytest.fixture
def apps(tun):
    with running_apps() as started:
        yield started


def link(pid, name):
    return Path(f"/proc/{pid}/{name}").readlink()


# sock_diag


def test_an_exact_request_finds_a_connection_before_its_syn_is_answered(diag):
    with connecting() as sock:
        assert (inode(sock), SYN_SENT) == diag.find(TCP, flow(sock))[0:4:3]


def test_af_inet_finds_the_ipv4_flow_of_a_dual_stack_socket(diag):
    with connecting(family=socket.AF_INET6) as sock:
        assert inode(sock) == diag.find(TCP, flow(sock)).inode


def test_udp_in_plain_order_finds_an_innocent_socket_on_the_remote_port(diag):
    with udp(port=5300) as innocent:
        plain = key(socket.AF_INET, FAR4, 5300, OWN4, 4000)  # as `find` turns it round: the flow 4000 > 5300
        assert inode(innocent) == diag.find(UDP, plain).inode


def test_a_socket_bound_to_a_device_is_found_only_by_naming_it(diag):
    with connecting(device=TUN) as sock:
        assert diag.find(TCP, flow(sock)) is None
        diag.interface = socket.if_nametoindex(TUN)
        assert inode(sock) == diag.find(TCP, flow(sock)).inode


def test_naming_a_device_finds_unbound_sockets_too(diag):
    diag.interface = socket.if_nametoindex(TUN)
    with connecting() as sock:
        assert inode(sock) == diag.find(TCP, flow(sock)).inode


def test_an_exact_request_names_one_member_of_a_port_that_is_shared(diag):
    with (
        udp(port=6000, options=(socket.SO_REUSEADDR,)) as first,
        udp(port=6000, options=(socket.SO_REUSEADDR,)) as last,
    ):
        named = {diag.find(UDP, key(socket.AF_INET, OWN4, 6000, FAR4, port)).inode for port in range(1, 50)}
        assert 1 == len(named & {inode(first), inode(last)})


def test_the_uid_is_that_of_the_sockets_creation(diag, apps):
    with connecting() as sock:
        apps.start(sock, uid=NOBODY)
        assert 0 == diag.find(TCP, flow(sock)).uid


def test_whoever_binds_a_udp_port_next_has_another_cookie(diag):
    cookies = set()
    for _ in range(2):
        with udp(port=6001) as sock:
            cookies.add(diag.find(UDP, flow(sock)).cookie)
    assert 2 == len(cookies)


def test_a_connection_whose_process_closed_it_has_inode_0(diag):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        (accepted, _), name, peer = server.accept(), client.getsockname(), client.getpeername()
        client.close()
        assert 0 == diag.find(TCP, key(socket.AF_INET, *name, *peer)).inode
        accepted.close()


def syn(source_port, destination_port):
    segment = tcp.TCP(sport=source_port, dport=destination_port, flags=tcp.TH_SYN, seq=1)
    return bytes(ip.IP(src=socket.inet_aton(FAR4), dst=socket.inet_aton(OWN4), p=TCP, ttl=64, data=segment))


def test_a_syn_ack_comes_from_a_request_of_inode_0_and_its_listener_is_found_without_the_peer(diag, tun):
    with socket.create_server(("0.0.0.0", 8080)) as server:
        os.write(tun, syn(5555, 8080))
        answer = key(socket.AF_INET, OWN4, 8080, FAR4, 5555)
        assert (0, SYN_RECV) == diag.find(TCP, answer)[0:4:3]
        assert (inode(server), LISTEN) == diag.find_listener(answer)[0:4:3]


def test_tcp_falls_back_to_the_listener_where_there_is_no_connection(diag):
    with socket.create_server(("0.0.0.0", 8080)) as server:
        assert inode(server) == diag.find(TCP, key(socket.AF_INET, OWN4, 8080, FAR4, 5555)).inode


# What exact requests cannot see of a port (KERNEL: explicit binds ignore reserved ports)


def test_an_exact_request_does_not_see_a_tcp_socket_that_is_bound_and_does_not_listen(diag):
    with socket.socket() as sock:
        sock.bind((OWN4, 50000))
        assert diag.find(TCP, key(socket.AF_INET, OWN4, 50000, "0.0.0.0", 0)) is None


def test_an_exact_request_without_a_peer_does_not_see_a_connected_udp_socket(diag):
    with udp(port=50000) as sock:
        sock.connect((FAR4, 7))
        assert diag.find(UDP, key(socket.AF_INET, OWN4, 50000, "0.0.0.0", 0)) is None


@pytest.mark.parametrize("connected", [False, True])
def test_an_explicit_bind_ignores_reserved_ports_and_a_second_one_meets_it(tun, connected):
    Path("/proc/sys/net/ipv4/ip_local_reserved_ports").write_text("50000")
    with udp(port=50000) as sock:
        if connected:
            sock.connect((FAR4, 7))
        with socket.socket(type=socket.SOCK_DGRAM) as other, pytest.raises(OSError, match="in use"):
            other.bind((OWN4, 50000))


def test_a_bind_meets_a_socket_that_is_bound_to_a_device(tun):
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, TUN.encode())
        sock.bind(("", 50000))
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((OWN4, 50000))


# /proc


def test_a_shared_socket_shows_under_every_holder_by_the_same_number(apps):
    with connecting() as sock:
        name = f"fd/{sock.fileno()}"
        assert Path(f"socket:[{inode(sock)}]") == link(apps.start(sock), name) == link(os.getpid(), name)


def test_a_descriptor_on_a_process_directory_dies_with_the_process(tun):
    process = subprocess.Popen([CAT], stdin=subprocess.PIPE)
    directory = os.open(f"/proc/{process.pid}", os.O_PATH)
    try:
        process.communicate()
        with pytest.raises(ProcessLookupError):
            os.open("stat", os.O_RDONLY, dir_fd=directory)
    finally:
        os.close(directory)


def test_the_process_directory_belongs_to_the_effective_user_dumpable_or_not(apps):
    # The kernel makes undumpable what changes its user.
    directory = Path(f"/proc/{apps.python('import os; os.setresuid(0, 65534, 0)')}")
    assert (0, NOBODY) == ((directory / "exe").lstat().st_uid, directory.stat().st_uid)


def test_another_mount_namespace_shows_a_path_that_is_not_the_file_that_runs(apps, tmp_path):
    shown = copy_of_cat(tmp_path / "shown")
    pid = apps.launch(["unshare", "--mount", "sh", "-c", f"mount --bind {CAT} {shown} && exec {shown}"])
    assert (shown, False) == (link(pid, "exe"), shown.samefile(f"/proc/{pid}/exe"))


def test_an_upgraded_program_is_shown_as_deleted(apps, tmp_path):
    program = copy_of_cat(tmp_path / "program")
    pid = apps.start(program=program)
    copy_of_cat(tmp_path / "new").rename(program)
    assert Path(f"{program} (deleted)") == link(pid, "exe")
