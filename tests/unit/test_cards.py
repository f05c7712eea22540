"""What CUDA, nvidia-smi and the network say, with all three faked."""

import pytest
import torch
from test_placement import T4, V100, found
from test_seats import make_plan

from llmpq.errors import UserError
from llmpq.runtime import cards, interface
from llmpq.runtime.process import Role

SMI = """0, Tesla T4, 15360, 7.5, GPU-aa
1, Tesla V100-SXM2-32GB, 32768, 7.0, GPU-bb
2, [Unknown Error], [N/A], [N/A], [N/A]
a line of another form
"""


class Properties:
    name, total_memory, major, minor, uuid = "Tesla T4", 15 * 2**30, 7, 5, "aa"


def test_lines_of_nvidia_smi():
    found = cards.parse_cards(SMI)
    assert [(card.index, card.name, card.uuid) for card in found] == [
        (0, "Tesla T4", "GPU-aa"),
        (1, "Tesla V100-SXM2-32GB", "GPU-bb"),
    ]
    assert found[1].memory_bytes == 32768 * 2**20
    assert cards.parse_cards("") == ()


def test_cards_as_cuda_numbers_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = cards.visible_cards()
    assert [card.index for card in found] == [0, 1]
    assert found[0].compute_capability == "7.5" and found[0].uuid == "aa"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cards.visible_cards() == ()


def test_hosts_are_numbered_as_torchrun_does(monkeypatch):
    monkeypatch.setattr(cards, "visible_cards", lambda: ("seen",))
    monkeypatch.setattr(cards, "all_cards", lambda: ("all",))
    role = Role(rank=5, size=8, local_rank=1, local_size=4)
    assert cards.this_process(role, {"GROUP_RANK": "1"}, True).group == 1
    assert cards.this_process(role, {}, True).group == 4  # the first rank of the host
    assert cards.this_process(role, {}, True).everywhere == ()  # nothing is hidden
    hidden = cards.this_process(role, {"CUDA_VISIBLE_DEVICES": "0"}, True)
    assert (hidden.cards, hidden.everywhere) == (("seen",), ("all",))
    assert cards.this_process(role, {}, False).cards == ()


@pytest.mark.parametrize(
    "addresses, route, expected",
    [
        ({"lo": "127.0.0.1", "eth0": "10.0.0.2", "eth1": "10.1.0.2"}, "10.1.0.2", "eth1"),
        ({"lo": "127.0.0.1", "eth0": "10.0.0.2"}, "127.0.1.1", "eth0"),  # Debian's own name
        ({"lo": "127.0.0.1", "eth0": "10.0.0.2", "eth1": "10.1.0.2"}, "127.0.1.1", None),
        ({"lo": "127.0.0.1"}, "127.0.0.1", None),
    ],
)
def test_the_interface_that_reaches_the_meeting_point(monkeypatch, addresses, route, expected):
    monkeypatch.setattr(interface, "interface_addresses", lambda: addresses)
    monkeypatch.setattr(
        interface, "_own_address", lambda host: "" if host == interface.ELSEWHERE else route
    )
    assert interface.interface_towards("lead") == expected


def test_what_a_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(interface, "interface_towards", lambda host: "eth7")
    variables = {"GLOO_SOCKET_IFNAME": "mine"}
    interface.name_interface(variables, is_one_machine=False)
    assert variables == {"GLOO_SOCKET_IFNAME": "mine", "NCCL_SOCKET_IFNAME": "eth7"}


def test_on_one_machine_gloo_listens_on_loopback_alone():
    variables, chosen = {}, {"GLOO_SOCKET_IFNAME": "mine"}
    interface.name_interface(variables, is_one_machine=True)
    interface.name_interface(chosen, is_one_machine=True)
    assert variables == {"GLOO_SOCKET_IFNAME": interface.loopback()}
    assert chosen == {"GLOO_SOCKET_IFNAME": "mine"}


def test_a_run_is_refused_before_it_loads(monkeypatch):
    alone = Role(0, 1, 0, 1)
    plan = make_plan(("a", "v100-32g"))
    monkeypatch.setattr(cards, "visible_cards", lambda: tuple(found(T4)))
    with pytest.raises(UserError, match="planned: stage 0 v100-32g.*found: cuda:0 Tesla T4"):
        cards.find_seats(plan, alone, "auto")
    with pytest.raises(UserError, match="v100-32g"):
        cards.find_seats(plan, alone, "cuda")
    assert cards.find_seats(plan, alone, "cpu") == ([(0, None)], False)
    monkeypatch.setattr(cards, "visible_cards", lambda: tuple(found(T4, V100)))
    assert cards.find_seats(plan, alone, "auto") == ([(0, 1)], False)
    monkeypatch.setattr(cards, "visible_cards", lambda: ())
    assert cards.find_seats(plan, alone, "auto") == ([(0, None)], True)


def test_rehearsed_stages_share_whatever_is_there(monkeypatch):
    plan = make_plan(("a", "fast"), rehearse={"fast": {"slowdown": 1, "memory_mib": 100}})
    monkeypatch.setattr(cards, "visible_cards", lambda: tuple(found(T4)))
    assert cards.find_seats(plan, Role(0, 1, 0, 1), "cuda") == ([(0, None)], False)
