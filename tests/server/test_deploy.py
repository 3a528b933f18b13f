"""What deploys the server fits the server: its options, its metrics, its paths and how long it takes to end."""

import ast
import asyncio
import json
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from internvl_rt.arguments import options_of
from internvl_rt.engine.options import EngineOptions
from internvl_rt.server.arguments import build_parser
from internvl_rt.server.metrics import PREFIX, Metrics
from internvl_rt.server.options import SERVER_KINDS, ServerOptions

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
DEFAULTS = {field.name: field.default for field in fields(ServerOptions)}
PORT = DEFAULTS["port"]
METRIC = re.compile(rf"{PREFIX}\w+")
SIZES = ((30, "GiB"), (20, "MiB"), (10, "KiB"))
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")

# Options in deploy/ that are those of docker, kubectl, pip, apt, useradd, install and systemctl.
OTHERS = {
    *("constraint", "detach", "directory", "file", "filename", "from", "from-file", "gpus", "group", "help"),
    *("home-dir", "interval", "no-build-isolation", "no-deps", "no-install-recommends", "no-log-init", "now"),
    *("owner", "profile", "publish", "retries", "shell", "start-period", "system", "tag", "timeout", "uid"),
    *("user-group", "volume", "wheel-dir", "yes"),
}


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def served(arguments: list[str]) -> ServerOptions:
    """Returns the options of `internvl-rt serve` with some arguments, which its own parser reads."""
    return ServerOptions(**options_of(build_parser("").parse_args(arguments), SERVER_KINDS))


def seconds(text: str) -> float:
    """Reads a span of time of a unit or a compose file."""
    number, unit = re.fullmatch(r"(\d+)(s|m|min|)", text).groups()  # type: ignore[union-attr]
    return int(number) * (60 if unit.startswith("m") else 1)


def instructions() -> list[tuple[str, str]]:
    """Returns the instructions of the Dockerfile, each with its text in one line."""
    lines = [line for line in read("Dockerfile").splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def unit() -> dict[str, list[str]]:
    """Returns the settings of the service, each with all its values."""
    settings: dict[str, list[str]] = {}
    for line in read("internvl-rt.service").replace("\\\n", " ").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            settings.setdefault(key, []).append(value)
    return settings


def kubernetes() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(read("kubernetes.yaml"))}


def metric_names() -> tuple[set[str], set[str]]:
    """Returns the names of the server's metrics: those without a histogram's suffixes, and all that queries may use."""
    metrics = Metrics("m", lambda: {})
    metrics.failed("invalid_json")
    families = list(text_string_to_metric_families(metrics.render().decode()))
    kinds = {family.name: family.type for family in families if not family.name.endswith("_created")}
    names = {f"{name}_total" if kind == "counter" else name for name, kind in kinds.items()}
    parts = {
        f"{name}_{end}" for name, kind in kinds.items() if kind == "histogram" for end in ("bucket", "sum", "count")
    }
    return names, parts


def without_suffix(names: set[str], parts: set[str]) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) if name in parts else name for name in names}


def default_in_table(name: str) -> str:
    """Writes the default of an option as the page does."""
    value = DEFAULTS[name]
    if value in (None, ()):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return next(f"{value >> power} {unit}" for power, unit in SIZES if value % (1 << power) == 0)
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_unit_starts_the_server_with_arguments_that_it_takes_and_waits_longer_than_it_drains() -> None:
    settings = unit()
    (command,) = settings["ExecStart"]
    program, verb, *arguments = shlex.split(command)
    options = served([argument.replace("${MODEL}", "tiny") for argument in arguments])
    assert program.endswith("/bin/internvl-rt")
    assert verb == "serve"
    assert options.api_keys_file == "${CREDENTIALS_DIRECTORY}/api-keys"
    assert settings["LoadCredential"] == ["api-keys:/etc/internvl-rt/api-keys"]
    assert seconds(settings["TimeoutStopSec"][0]) > options.drain_s
    assert int(settings["LimitNOFILE"][0]) > options.max_connections


def test_the_unit_is_hardened_but_for_what_shuts_out_the_gpu_or_triton() -> None:
    settings = unit()
    expected = {
        "DynamicUser": "yes",
        "NoNewPrivileges": "yes",
        "PrivateTmp": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "CapabilityBoundingSet": "",
        "Restart": "on-failure",
    }
    assert {key: settings[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "DeviceAllow", "ProtectClock"} & set(settings)


def test_the_compose_file_starts_the_server_with_arguments_that_it_takes_and_waits_longer_than_it_drains() -> None:
    compose = yaml.safe_load(read("compose.yaml"))
    server = compose["services"]["server"]
    options = served(server["command"])
    assert options.host == "0.0.0.0"
    assert options.api_keys_file == "/run/secrets/api-keys"
    assert "api-keys" in server["secrets"]
    assert set(compose["secrets"]) == {"api-keys", "metrics-key"}
    assert f":{options.port}/health" in " ".join(server["healthcheck"]["test"])
    assert server["ports"] == [f"127.0.0.1:{options.port}:{options.port}"]
    assert seconds(server["stop_grace_period"]) > options.drain_s
    assert server["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()


def test_prometheus_and_grafana_find_the_server_its_key_and_the_dashboard() -> None:
    compose = yaml.safe_load(read("compose.yaml"))
    services = compose["services"]
    assert [name for name in services if services[name].get("profiles") == ["metrics"]] == ["prometheus", "grafana"]
    configs = {name: yaml.safe_load(each["content"]) for name, each in compose["configs"].items()}
    (job,) = configs["prometheus"]["scrape_configs"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/metrics-key"
    assert services["prometheus"]["secrets"] == ["metrics-key"]
    assert job["static_configs"] == [{"targets": [f"server:{PORT}"]}]
    (provider,) = configs["grafana-dashboards"]["providers"]
    source, target, _ = next(each for each in services["grafana"]["volumes"] if "grafana.json" in each).split(":")
    assert target.startswith(provider["options"]["path"])
    assert (DEPLOY / source).is_file()


def test_kubernetes_probes_the_right_paths_and_waits_for_endpoints_and_for_the_drain() -> None:
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    options = served(server["args"])
    paths = {name: server[name]["httpGet"]["path"] for name in server if name.endswith("Probe")}
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert server["ports"] == [{"name": "http", "containerPort": options.port}]
    sleep_s = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    ready = server["readinessProbe"]
    assert sleep_s >= ready["periodSeconds"] * ready["failureThreshold"]
    assert pod["terminationGracePeriodSeconds"] > sleep_s + options.drain_s
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_kubernetes_gives_no_rights_and_room_for_caches_alone() -> None:
    made = kubernetes()
    pod = made["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {each["name"]: each["mountPath"] for each in server["volumeMounts"]}
    assert mounts == {"cache": "/cache", "tmp": "/tmp", "keys": "/keys"}
    assert set(mounts) == {each["name"] for each in pod["volumes"]}
    labels = made["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert made["Service"]["spec"]["selector"] == labels
    assert made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_the_image_runs_the_server_as_a_user_without_rights() -> None:
    made = instructions()
    bases = [rest.split()[0] for word, rest in made if word == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", base) for base in bases)
    last = made[max(index for index, (word, _) in enumerate(made) if word == "FROM") :]
    one = dict(last)
    assert sum(word in ("USER", "ENTRYPOINT", "HEALTHCHECK", "STOPSIGNAL", "EXPOSE") for word, _ in last) == 5
    assert int(one["USER"].partition(":")[0]) > 0
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    assert one["USER"] == "{runAsUser}:{runAsGroup}".format_map(pod["securityContext"])
    assert json.loads(one["ENTRYPOINT"]) == ["internvl-rt", "serve"]
    assert json.loads(one["HEALTHCHECK"].partition("CMD ")[2])[0] == "python"
    assert f"127.0.0.1:{PORT}/health" in one["HEALTHCHECK"]
    assert (one["STOPSIGNAL"], one["EXPOSE"], one["VOLUME"]) == ("SIGTERM", str(PORT), "/cache")
    installed = next(rest for word, rest in last if word == "RUN" and "apt-get" in rest)
    assert re.findall(r"install --yes --no-install-recommends ([\w+. -]+?) +&&", installed) == ["gcc libc6-dev"]


def test_the_image_has_the_versions_and_extras_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    made = instructions()
    labels = next(rest for word, rest in made if word == "LABEL")
    assert f'image.version="{project["version"]}"' in labels
    assert f'image.licenses="{project["license"]}"' in labels
    assert yaml.safe_load(read("compose.yaml"))["services"]["server"]["image"] == f"internvl-rt:{project['version']}"
    runs = " ".join(rest for word, rest in made if word == "RUN")
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", runs)
    # The image runs one server; on a Ray cluster, images are Ray's own.
    assert set(extras.split(",")) == set(project["optional-dependencies"]) - {"bench", "completion", "ray", "test"}
    assert all("--constraint constraints.txt" in each for each in re.findall(r"pip install [^&]+", runs))


def test_what_the_image_is_built_from_is_let_in() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*"
    assert {"constraints.txt", "csrc", "internvl_rt", "kernels", "pyproject.toml", "setup.py"} < set(let_in)
    assert [name for name in let_in if not (ROOT / name).exists()] == []


def test_the_dashboard_has_each_metric_and_no_other() -> None:
    names, parts = metric_names()
    board = json.loads(read("grafana.json"))
    targets = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    used = set(METRIC.findall("\n".join(targets)))
    assert used <= names | parts
    assert without_suffix(used, parts) == names
    assert all("$model_name" in target for target in targets)


def test_the_dashboard_is_one_that_grafana_11_takes() -> None:
    board = json.loads(read("grafana.json"))
    assert board["schemaVersion"] >= 39
    assert [each["name"] for each in board["templating"]["list"]] == ["datasource", "model_name"]
    ids = [panel["id"] for panel in board["panels"]]
    assert ids == list(range(1, len(ids) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_alerts_use_metrics_and_error_codes_that_exist() -> None:
    names, parts = metric_names()
    rules = [rule for group in yaml.safe_load(read("alerts.yaml"))["groups"] for rule in group["rules"]]
    queries = "\n".join(rule["expr"] for rule in rules)
    assert set(METRIC.findall(queries)) <= names | parts
    codes = {code for found in re.findall(r'code=~?"([\w|]+)"', queries) for code in found.split("|")}
    assert codes
    assert codes <= error_codes()
    assert all(rule["annotations"]["summary"] for rule in rules)


def test_the_page_names_each_metric_and_no_other() -> None:
    names, parts = metric_names()
    named = set(METRIC.findall(PAGE))
    assert named <= names | parts
    assert without_suffix(named, parts) == names


def test_the_page_has_each_option_of_the_server_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `--([a-z0-9-]+)` \| (.*?) ?\| ", PAGE, re.MULTILINE))
    expected = {name.replace("_", "-"): default_in_table(name) for name in DEFAULTS}
    assert rows == expected


def test_options_that_the_page_and_the_files_name_exist() -> None:
    known = {field.name.replace("_", "-") for options in (ServerOptions, EngineOptions) for field in fields(options)}
    known |= {f"no-{name}" for name in known}
    on_page = {found[1] for code in re.findall(r"`(--[^`]+)`", PAGE) if (found := OPTION.match(code))}
    assert len(on_page) > 50
    assert on_page <= known
    in_files = {name for file in sorted(DEPLOY.iterdir()) for name in OPTION.findall(file.read_text(encoding="utf-8"))}
    assert in_files - known == OTHERS
    assert {"host", "drain-s", "api-keys-file"} <= in_files


def error_codes() -> set[str]:
    """Returns the codes of errors in the server's modules."""
    codes: set[str] = set()
    for file in (ROOT / "internvl_rt/server").glob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                place = {"ApiError": 2, "refusal": 2}.get(call.func.id)
                given = [*call.args[place : place + 1]] if place is not None else []
                given += [each.value for each in call.keywords if place is not None and each.arg == "code"]
                nodes = [node for each in given for node in ast.walk(each)]
                codes |= {
                    node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
                }
    return codes | {"invalid_media", "invalid_request"}  # `fault` chooses between these two by the kind of error


def test_the_page_has_each_error_code_and_no_other() -> None:
    section = PAGE.partition("\n## Errors\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in section.splitlines() if re.match(r"\| \d{3} ", row)]
    assert {code for _, cell in rows for code in re.findall(r"`(\w+)`", cell)} == error_codes()


def test_the_application_of_the_page_can_be_built_and_has_the_paths_of_its_table() -> None:
    (program,) = re.findall(r"```python\n(# serving\.py\n.*?)```", PAGE, re.DOTALL)
    program = program.replace("OpenGVLab/InternVL3-8B", "tiny").replace("_s=120", "_s=120, page=False")
    names: dict[str, Any] = {}
    exec(compile(program, "serving.py", "exec"), names)
    app = names["build"]()

    async def run() -> None:
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(run())
    table = set(re.findall(r"`(?:GET|POST) (/[\w/]*)`", PAGE.partition("\n## Endpoints\n")[2].partition("\n## ")[0]))
    assert {route.path.replace("{name:path}", "NAME") for route in app.routes} == table - {"/"}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([\w-]+)\)", PAGE))))
def test_links_inside_the_page_lead_to_a_heading(link: str) -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert link in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
