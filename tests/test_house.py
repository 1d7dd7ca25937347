"""The house rules that a reader relies on: who imports whom, what is generated, what each module says of itself.

Reads the source with ast and imports nothing of it. The tables below are the rules.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTAINERS = (ROOT / "client", ROOT / "daemon")
GENERATED = "hearth.v1"

# From the top down. A module reaches, by whatever way, only modules of the layers below its own.
LAYERS = (
    {"hearthd.__main__"},
    {"hearthd.server"},
    {"hearthd.life.grpc_servers"},
    {"hearthd.life.parts"},
    {"hearthd.services.chat", "hearthd.services.model", "hearthd.services.status"},
    {"hearthd.models.pool"},
    {"hearthd.models.residents"},
    {"hearthd.models.entry"},
    {"hearthd.inference.worker"},
    {"hearthd.inference.inference_thread"},
    {"hearthd.generation.engine"},
    {"hearthd.generation.decode_step", "hearthd.generation.placing", "hearthd.generation.prompt_step"},
    {
        "hearthd.generation.batch",
        "hearthd.generation.collector",
        "hearthd.generation.idle_time",
        "hearthd.scheduling.chunks",
        "hearthd.scheduling.waits",
        "hearthd.generation.drafting",
    },
    {"hearthd.scheduling.scheduler"},
    {"hearthd.scheduling.demand", "hearthd.scheduling.fair_queue", "hearthd.scheduling.pace"},
    {"hearthd.runtime.runner", "hearthd.kv.kv_cache", "hearthd.sequences.sampling", "hearthd.text.tokenizer"},
    {"hearthd.bundles.bundle"},
)
# Within one layer nobody imports a neighbour, but for these.
NEIGHBOURS = {
    ("hearthd.runtime.runner", "hearthd.kv.kv_cache"): "it fulfils the protocol that stands there, and raises its error"
}
# The rooms of the daemon, from the top down, and the modules at its door: none imports from one above it.
ROOMS = (
    "__main__",
    "doctor",
    "bench",
    "server",
    "life",
    "services",
    "audit",
    "watching",
    "pairing",
    "models",
    "inference",
    "generation",
    "scheduling",
    "sequences",
    "drafts",
    "build",
    "policy",
    "access",
    "listening",
    "text",
    "runtime",
    "kv",
    "bundles",
    "board",
    "configuration",
    "logs",
    "durable_file",
    "thread_name",
    "errors",
    "priority",
    "version",
)
# What `build` may take from the serving side beside `bundle` and what that stands on, with the reason.
BUILD_MAY_IMPORT = {
    ("hearthd.build.builder", "hearthd.text.tokenizer"): "it calibrates on the token ids that the model will get",
    (
        "hearthd.build.quantization.documents",
        "hearthd.text.tokenizer",
    ): "it makes them of texts",
    ("hearthd.build.report.greedy_comparison", "hearthd.text.tokenizer"): "it asks as a chat does",
    (
        "hearthd.build.quantization.session",
        "hearthd.runtime.plain_attention",
    ): "what is judged is what is served",
    ("hearthd.build.report.answers", "hearthd.text.tokenizer"): "it shows token ids as text",
}
# The folders of `build`, each of which may take from itself and from those that it names.
BUILD_FOLDERS = {
    "decoder": set(),
    "checkpoints": {"decoder"},
    "sources": {"decoder", "checkpoints"},
    "quantization": {"decoder", "checkpoints"},
    "report": {"decoder", "quantization", "builder"},
}
# Packages that few may know: everybody else stays testable, and replaceable, without them.
ONLY_IN = {
    # The oracle runs what others exported, whose inputs are not those of Hearth's own graphs.
    "onnxruntime": {
        "hearthd.runtime.run_buffers",
        "hearthd.runtime.runner",
        "hearthd.runtime.session",
        "hearthd.build.quantization.session",
        "hearthd.build.quantization.oracle",
    },
    "systemd": {"hearthd.life.notify", "hearthd.logs"},
    "torch": {"hearthd.build.sources.optimum_export"},
    "transformers": {"hearthd.build.sources.optimum_export"},
    "optimum": {"hearthd.build.sources.optimum_export"},
    "cryptography": {"hearthd.pairing.certificate", "hearthd.access.peer_certificate", "hearthd.doctor.credentials"},
    "segno": {"hearthd.pairing.cli"},
    # Most daemons need none of it: `observation` imports these only where metrics are configured.
    "prometheus_client": {
        "hearthd.watching.metrics.figures",
        "hearthd.watching.metrics.live",
        "hearthd.watching.observation",
    },
    # An extra on the client's side, asked for by name before it is imported.
    "zeroconf": {"hearth._discovery", "hearthd.listening.announcing"},
}
MAX_LINES = 400


@dataclass(frozen=True, slots=True)
class Import:
    """An imported module; `at_import` unless the statement stands in a function or serves type checkers only."""

    name: str
    at_import: bool


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    imports: frozenset[Import]

    @property
    def imported(self) -> frozenset[str]:
        return frozenset(found.name for found in self.imports)


def module_name(path: Path, container: Path) -> str:
    parts = path.relative_to(container).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_statements(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_import
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from import_statements(child, at_import and not in_function and not for_types)


def read_modules() -> dict[str, Module]:
    paths = {module_name(path, container): path for container in CONTAINERS for path in container.rglob("*.py")}
    modules = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_bytes(), filename=str(path))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found: set[Import] = set()
        for statement, at_import in import_statements(tree):
            if isinstance(statement, ast.Import):
                targets = [alias.name for alias in statement.names]
            else:
                base = statement.module or ""
                if statement.level:
                    above = package.split(".")[: len(package.split(".")) - statement.level + 1]
                    base = ".".join([*above, *([base] if base else [])])
                # `from package import module` names a module; `from module import value` names the module itself.
                targets = [joined if (joined := f"{base}.{alias.name}") in paths else base for alias in statement.names]
            found.update(Import(target, at_import) for target in targets)
        modules[name] = Module(name, path, tree, frozenset(found))
    return modules


MODULES = read_modules()
WRITTEN = {name: module for name, module in MODULES.items() if not name.startswith(f"{GENERATED}.")}


def reachable(start: str) -> frozenset[str]:
    """Return all modules of ours that `start` imports, directly or through others, `start` only if there is a cycle."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in MODULES[waiting.pop()].imported & MODULES.keys() - seen:
            seen.add(name)
            waiting.append(name)
    return frozenset(seen)


def packages(module: Module) -> frozenset[str]:
    """Return the top-level names that a module imports."""
    return frozenset(name.partition(".")[0] for name in module.imported)


def test_the_layers_name_modules_that_exist() -> None:
    assert {name for layer in LAYERS for name in layer} - MODULES.keys() == set()


@pytest.mark.parametrize("depth", range(len(LAYERS)))
def test_imports_run_one_way(depth: int) -> None:
    not_below = set().union(*LAYERS[: depth + 1])
    wrong = {(name, target) for name in LAYERS[depth] for target in reachable(name) & not_below}
    assert wrong - NEIGHBOURS.keys() == set()


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_module_has_its_room() -> None:
    assert {room(name) for name in WRITTEN if name.startswith("hearthd.")} == set(ROOMS)


@pytest.mark.parametrize("above", ROOMS)
def test_rooms_import_downwards(above: str) -> None:
    wrong = {
        (name, target)
        for name, module in WRITTEN.items()
        if name.startswith("hearthd.") and room(name) == above
        for target in module.imported & MODULES.keys()
        if target.startswith("hearthd.") and ROOMS.index(room(target)) < ROOMS.index(above)
    }
    assert wrong == set()


def test_no_two_modules_need_each_other_to_be_imported() -> None:
    order: list[str] = []
    open_path: list[str] = []

    def visit(name: str) -> None:
        assert name not in open_path, f"a cycle: {' -> '.join([*open_path[open_path.index(name) :], name])}"
        if name in order:
            return
        open_path.append(name)
        for found in MODULES[name].imports:
            # A package's __init__ may import its own modules, and they it never.
            if found.at_import and found.name in MODULES:
                visit(found.name)
        open_path.pop()
        order.append(name)

    for name in MODULES:
        visit(name)
    assert len(order) == len(MODULES)


def test_the_client_never_imports_the_daemon() -> None:
    wrong = {name for name, module in MODULES.items() if name.startswith("hearth.") or name == "hearth"}
    wrong = {name for name in wrong if "hearthd" in packages(MODULES[name])}
    assert wrong == set()


def test_the_client_needs_only_what_a_plain_install_brings() -> None:
    allowed = set(sys.stdlib_module_names) | {"hearth", "grpc", "google"}
    wrong = {name: packages(module) - allowed for name, module in MODULES.items() if name.partition(".")[0] == "hearth"}
    assert {name: extra for name, extra in wrong.items() if extra} == {"hearth._discovery": {"zeroconf"}}
    # That extra is imported only when it is used.
    assert {found.name for found in MODULES["hearth._discovery"].imports if not found.at_import} == {"zeroconf"}


def test_the_daemon_takes_only_the_protocol_from_the_client() -> None:
    ours = {name for name in MODULES if name.partition(".")[0] == "hearth" and not name.startswith(GENERATED)}
    wrong = {name: module.imported & ours for name, module in MODULES.items() if name.startswith("hearthd")}
    assert {name: extra for name, extra in wrong.items() if extra} == {}


def test_build_takes_nothing_of_the_serving_side_but_bundle() -> None:
    serving = (
        reachable("hearthd.server")
        - reachable("hearthd.bundles.bundle")
        - {"hearthd.bundles.bundle", "hearthd.configuration.paths", "hearthd"}
    )
    taken = {
        (name, target)
        for name, module in MODULES.items()
        if name.startswith("hearthd.build")
        for target in module.imported & serving
    }
    # Equal, not a subset: an exception that nobody uses any more is to be struck out.
    assert taken == BUILD_MAY_IMPORT.keys()


def test_folders_of_build_import_one_way() -> None:
    for folder, others in BUILD_FOLDERS.items():
        inside = [module for name, module in MODULES.items() if name.startswith(f"hearthd.build.{folder}.")]
        taken = {name.split(".")[2] for module in inside for name in module.imported if name.count(".") >= 2}
        taken &= {name.split(".")[2] for name in MODULES if name.startswith("hearthd.build.")}
        assert taken == others | {folder}, folder


def test_policy_imports_one_way_and_knows_no_grpc() -> None:
    order = [f"hearthd.policy.{name}" for name in ("policy_file", "rules", "screening", "search", "phrases", "folding")]
    assert set(order) | {"hearthd.policy"} == {name for name in MODULES if name.startswith("hearthd.policy")}
    for place, name in enumerate(order):
        assert reachable(name) & set(order[: place + 1]) == set(), name
        assert {"grpc", "asyncio"} & set().union(
            *(packages(MODULES[each]) for each in {name, *reachable(name)})
        ) == set()


def test_serving_needs_nothing_of_build() -> None:
    assert {name for name in reachable("hearthd.server") if name.startswith("hearthd.build")} == set()
    # The command line knows both sides; of build it takes the subcommand and no more.
    taken = {name for name in MODULES["hearthd.__main__"].imported if name.startswith("hearthd.build")}
    assert taken <= {"hearthd.build", "hearthd.build.cli"}


def test_bench_runs_the_engine_without_a_server() -> None:
    bench = {name for name in MODULES if name.startswith("hearthd.bench")}
    below = bench.union(*(reachable(name) for name in bench))
    wrong = {name: packages(MODULES[name]) & {"asyncio", "grpc", "google", "hearth"} for name in below}
    assert {name: extra for name, extra in wrong.items() if extra} == {}
    # What it measures must not be a build's own graph, and nobody serves by it.
    assert {name for name in below if name.startswith("hearthd.build")} == set()
    users = {name for name in MODULES.keys() - bench if MODULES[name].imported & bench}
    # The doctor says what the memory would allow.
    assert users == {"hearthd.__main__", "hearthd.doctor.model_files"}
    assert MODULES["hearthd.__main__"].imported & bench == {"hearthd.bench.cli"}
    assert MODULES["hearthd.doctor.model_files"].imported & bench == {
        "hearthd.bench.bandwidth",
        "hearthd.bench.traffic",
    }


def test_the_doctor_looks_from_outside() -> None:
    """A daemon that does not start, or whose packages are broken, must still be examined."""
    doctor = {name for name in MODULES if name.startswith("hearthd.doctor")}
    forbidden = {
        "hearthd.server",
        "hearthd.life.parts",
        "hearthd.services.chat",
        "hearthd.inference.worker",
        "hearthd.generation.engine",
        "hearthd.runtime.runner",
    }
    assert {name for name in doctor if reachable(name) & forbidden} == set()
    assert {name for name in MODULES.keys() - doctor if MODULES[name].imported & doctor} == {"hearthd.__main__"}


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_known_to_few(package: str) -> None:
    knowing = {name for name, module in MODULES.items() if package in packages(module)}
    assert knowing == ONLY_IN[package]


def test_the_engine_and_all_below_know_no_event_loop_and_no_grpc() -> None:
    below = {"hearthd.generation.engine", *reachable("hearthd.generation.engine")}
    wrong = {name: packages(MODULES[name]) & {"asyncio", "grpc", "google", "hearth"} for name in below}
    assert {name: extra for name, extra in wrong.items() if extra} == {}


@pytest.mark.parametrize(
    "name",
    ["configuration.roles", "access.caller", "access.tokens", "access.metering", "access.peer_certificate"],
)
def test_rights_and_limits_are_judged_without_grpc(name: str) -> None:
    below = {f"hearthd.{name}", *reachable(f"hearthd.{name}")}
    wrong = {each: packages(MODULES[each]) & {"grpc", "google", "hearth"} for each in below}
    assert {each: extra for each, extra in wrong.items() if extra} == {}


def test_only_statuses_answers_a_call_with_a_status() -> None:
    aborting = {
        name
        for name, module in WRITTEN.items()
        for node in ast.walk(module.tree)
        # What knows no gRPC aborts something else.
        if name.startswith("hearthd.") and "grpc" in packages(module)
        if isinstance(node, ast.Attribute) and node.attr in ("abort", "set_code")
    }
    assert aborting == {"hearthd.services.statuses"}


@pytest.mark.parametrize("package", ["numpy", "onnxruntime", "tokenizers", "jinja2", "zeroconf", "hearthd"])
def test_importing_the_client_does_not_load(package: str) -> None:
    program = f"import sys, hearth, hearth.__main__; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert (ast.get_docstring(WRITTEN[name].tree) or "").strip()


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_every_module_can_be_read_in_one_sitting(name: str) -> None:
    assert len(WRITTEN[name].path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    remedy = "run `make protos` and commit what it changes"
    done = subprocess.run(
        [ROOT / "deploy/dev/protos.sh", tmp_path], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"the protos could not be compiled ({done.stderr.strip()}): {remedy}"
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "hearth/v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "client/hearth/v1").glob("*_pb2*")}
    assert fresh.keys() == committed.keys(), remedy
    assert [name for name in fresh if fresh[name] != committed[name]] == [], remedy


@pytest.mark.parametrize(
    ("file", "extras", "groups"),
    [("constraints.txt", ["daemon"], ["test", "reference"]), ("constraints-export.txt", ["daemon", "export"], [])],
)
def test_constraints_pin_every_requirement_by_name_and_version_only(
    file: str, extras: list[str], groups: list[str]
) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    required = list(project["project"]["dependencies"])
    required += [each for extra in extras for each in project["project"]["optional-dependencies"][extra]]
    required += [each for group in groups for each in project["dependency-groups"][group]]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~;\[]", line)[0]).lower() for line in required}
    assert names - {pin.partition("==")[0] for pin in pins} == set(), "run `make constraints`"
