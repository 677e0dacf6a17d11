"""Small helpers on torch.fx graphs, one by one; test_conversion_graph.py sees them at work."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from snnkernels.conversion import graphs
from snnkernels.conversion.inputs import network_input


class Net(nn.Module):
    """A module called twice, one inside another, a function with named arguments, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.deep = nn.Sequential(nn.Sequential(nn.ReLU()))
        self.deep.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(self.deep(self.fc(x)))
        return torch.relu(input=torch.mul(h, self.deep.gain))


def traced() -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    module = fx.symbolic_trace(Net())
    return module, {node.name: node for node in module.graph.nodes}


def test_the_module_of_a_node_is_the_one_it_calls() -> None:
    net, nodes = traced()
    assert graphs.module_of(net, nodes["fc"]) is net.fc
    assert graphs.module_of(net, nodes["fc_1"]) is net.fc
    assert graphs.module_of(net, nodes["deep_0_0"]) is net.get_submodule("deep.0.0")
    for other in ("x", "deep_gain", "mul", "relu", "output"):
        assert graphs.module_of(net, nodes[other]) is None
    for no_node in (None, 3, "fc", [nodes["fc"]]):
        assert graphs.module_of(net, no_node) is None


def test_the_first_input_is_found_by_position_and_by_name() -> None:
    _, nodes = traced()
    assert graphs.first_input(nodes["mul"]) is nodes["fc_1"]
    assert graphs.first_input(nodes["relu"]) is nodes["mul"]
    assert graphs.first_input(nodes["fc"]) is nodes["x"]


def test_what_is_given_are_inputs_and_constants() -> None:
    _, nodes = traced()
    assert [name for name, node in nodes.items() if graphs.is_given(node)] == ["x", "deep_gain"]
    graph = fx.Graph()
    packed = graph.placeholder("inputs")
    named = graph.call_function(network_input, (packed, "mask"))
    called = graph.call_function(torch.relu, (named,))
    assert [graphs.is_given(node) for node in (packed, named, called)] == [True, True, False]


def test_nodes_are_known_by_the_path_of_their_module() -> None:
    _, nodes = traced()
    names = {name: graphs.name_of(node) for name, node in nodes.items()}
    assert names["fc_1"] == "fc"
    assert names["deep_0_0"] == "deep.0.0"
    assert names["relu"] == "relu"  # neither the target's str() nor that of a method
    assert names["x"] == "x"
    assert names["deep_gain"] == "deep_gain"


def test_a_module_is_added_where_nothing_is() -> None:
    net = Net()
    first, second, third, nested = (nn.Identity() for _ in range(4))
    assert graphs.add_module(net, "fc", first) == "fc_2"
    assert graphs.add_module(net, "fc", second) == "fc_3"
    assert graphs.add_module(net, "deep.0", third) == "deep.0_2"
    assert graphs.add_module(net, "new.inside.it", nested) == "new.inside.it"
    assert net.fc_2 is first
    assert net.fc_3 is second
    assert net.get_submodule("deep.0_2") is third
    assert net.get_submodule("new.inside.it") is nested
    # Beside what was put there before, which stays.
    beside = nn.Identity()
    assert graphs.add_module(net, "new.inside.too", beside) == "new.inside.too"
    assert net.get_submodule("new.inside.it") is nested
    assert net.get_submodule("new.inside.too") is beside
    # A parameter's name is taken too.
    assert graphs.add_module(net, "deep.gain", nn.Identity()) == "deep.gain_2"
    assert isinstance(net.fc, nn.Linear)


def test_a_copied_graph_is_its_own() -> None:
    net, nodes = traced()
    copy = graphs.copy_graph(net.graph)
    assert [(n.op, n.name) for n in copy.nodes] == [(n.op, n.name) for n in net.graph.nodes]
    assert not set(copy.nodes) & set(net.graph.nodes)
    x = torch.rand(2, 3)
    assert torch.equal(fx.GraphModule(net, copy)(x), net(x))
    next(n for n in copy.nodes if n.op == "call_function").target = torch.sub
    assert nodes["mul"].target is torch.mul


def test_a_module_of_one_call_is_replaced_and_a_shared_one_is_not() -> None:
    net, nodes = traced()
    new, own = nn.Identity(), nn.Identity()
    assert graphs.place_module(net, net.graph, nodes["deep_0_0"], new) == "deep.0.0"
    assert net.get_submodule("deep.0.0") is new
    before = net.fc
    assert graphs.place_module(net, net.graph, nodes["fc_1"], own) == "fc_2"
    assert net.fc is before
    assert net.fc_2 is own


def test_what_else_has_the_modules_name_is_no_call_of_it() -> None:
    """An input, a method and other modules: the module has one call and is replaced."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.relu, self.then = nn.Identity(), nn.ReLU(), nn.Identity()

        def forward(self, relu: Tensor) -> Tensor:
            return self.then(self.relu(self.before(relu)).relu())

    net = fx.symbolic_trace(Named())
    called = next(
        node for node in net.graph.nodes if (node.op, node.target) == ("call_module", "relu")
    )
    new = nn.Identity()
    assert graphs.place_module(net, net.graph, called, new) == "relu"
    assert net.relu is new


class Taken(nn.Module):
    """Names that torch.fx's modules have for themselves, and some that only look like them."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.graph_ = nn.Linear(3, 3)  # where graph would move to
        self.graphic = nn.Linear(3, 3)
        self.code = nn.Parameter(torch.rand(3))
        self.register_buffer("recompile", torch.rand(3))
        self.print_readable = torch.rand(3)
        self.deep = nn.Sequential()
        self.deep.graph = nn.Linear(3, 3)
        self.to_folder = nn.Linear(3, 3)  # nothing calls it

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep.graph(self.graphic(self.graph_(self.graph(x))))
        return (x * self.code + self.recompile) * self.print_readable


def test_names_of_graph_modules_are_freed() -> None:
    torch.manual_seed(0)
    net, x = Taken(), torch.rand(2, 3)
    want, graph = net(x), fx.Tracer().trace(net)
    held = (net.graph, net.graph_, net.code, net.recompile, net.print_readable)
    graphs.free_names(net, graph)
    found = (net.graph__, net.graph_, net.code_, net.recompile_, net.print_readable_)
    assert all(a is b for a, b in zip(held, found, strict=True))
    assert not any(hasattr(net, name) for name in ("graph", "code", "recompile", "print_readable"))
    assert isinstance(net.to_folder, nn.Linear)
    targets = [str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")]
    assert targets == [
        *("graph__.0", "graph__.1", "graph_", "graphic", "deep.graph"),
        *("code_", "recompile_", "print_readable_"),
    ]
    assert torch.equal(fx.GraphModule(net, graph)(x), want)
    before = str(graph)
    graphs.free_names(net, graph)  # nothing is left to do
    assert str(graph) == before


def test_steps_are_the_last_input_whatever_it_is_called() -> None:
    graph = fx.Graph()
    first, steps = graph.placeholder("T"), graph.placeholder("steps")
    product = graph.call_function(torch.mul, (first, steps))
    graph.output(product)
    assert [graphs.is_steps(v) for v in (first, steps, product, "steps", 3, None)] == [
        *(False, True), *(False,) * 4,
    ]  # fmt: skip
