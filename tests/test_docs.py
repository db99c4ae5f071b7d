"""Commands and links in the documentation, and commands in the deployment files and workflows, are valid."""

import ast
import json
import re
import shlex
import shutil
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from llm2clip import LLM2CLIP
from llm2clip.cli import build_parser, main
from llm2clip.models.dual_encoder import DualEncoder
from search_fixtures import make_index

ROOT = Path(__file__).parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted([*ROOT.glob("[A-Z]*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")])
INCOMPLETE = {"align --config cpu-llm", "evaluate --benchmarks"}  # commands that the text mentions without arguments


def code_blocks(page: Path, language: str = r"\w*") -> list[str]:
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in blocks]


def documented_commands() -> list[tuple[str, str]]:
    """Return (page, arguments) for each llm2clip command in a code block, in a YAML `command` list, or in the text."""
    commands = []
    for page in PAGES:
        for block in code_blocks(page):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            matches = [re.search(r"(?<!\S)llm2clip(?:-cuda)? +([a-z]+(?: .*)?)$", line) for line in lines]
            commands += [(page.name, m[1]) for m in matches if m and not m[1].startswith(("import ", "reads only "))]
        for block in code_blocks(page, "yaml"):
            for items in re.findall(r"command: (\[.*?\])", block, flags=re.DOTALL):
                commands.append((page.name, re.sub("^.* llm2clip ", "", shlex.join(yaml.safe_load(items)))))
        commands += [
            (page.name, " ".join(call.split())) for call in re.findall(r"`llm2clip ([a-z]+\s[^`]+)`", page.read_text())
        ]
    return [(page, command) for page, command in commands if command not in INCOMPLETE]


@pytest.mark.parametrize(("page", "command"), documented_commands())
def test_documented_command_parses(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser, run = build_parser()
    try:
        args = parser.parse_args(shlex.split(command, comments=True))
    except SystemExit as error:
        raise AssertionError(f"{page}: {command}") from error
    assert args.subcommand in run


@pytest.fixture
def workspace(
    model_folder: Path, image_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Current folder with a tiny model, images and captions under the names that are used in the documentation."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "RUN/model", "STUDENT/model", "runs/mine/model", "runs/photos/model"):
        shutil.copytree(model_folder, name)
    for name in ("DATA", "PHOTOS"):
        shutil.copytree(image_folder, name)
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    shutil.copy("captions.jsonl", "photos.jsonl")
    Path("photos.csv").write_text("image,caption\n0.png,a red square\n1.png,a green square\n")
    for file in ("cat.jpg", "sunset.jpg", photos / "beach.jpg"):
        Image.new("RGB", (1200, 1000)).save(file)
    return tmp_path


def test_documented_commands_run_with_tiny_models(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not run: commands that train, download, serve, export graphs, or use a GPU, a database or a benchmark."""
    unavailable = "--baselines|--benchmarks|--ocr|--dim|--server|postgresql|onnx|gallery|@test|mine.jsonl|DATA[.]{3}"
    commands = [command for _, command in documented_commands() if not re.search(unavailable, command)]
    commands = [c for c in commands if re.match(r"(data|index|search|evaluate MODEL|export|benchmarks|runs) ", c)]
    commands.sort(key=lambda c: (not c.startswith("index"), "--model" not in c))  # a new index needs --model
    assert len(commands) > 25
    for command in dict.fromkeys(commands):
        assert main(shlex.split(command, comments=True)) == 0, f"{command}: {capsys.readouterr().err}"


def test_python_examples_run_with_tiny_models(workspace: Path, photos: Path, dual_encoder: DualEncoder) -> None:
    """Other tests run dense.md, one_index.md and the databases of export.md. The hub and servers are not available."""
    make_index(workspace / "INDEX", photos, dual_encoder)
    variables = {
        "pil_image": Image.new("RGB", (40, 30)),
        "pixels": torch.rand(1, 3, 64, 64),
        "images": torch.eye(2, 3),
        "texts": torch.eye(3),
        "model": LLM2CLIP.from_pretrained("MODEL"),
        "row": {"captions": ["A deer on a lawn"]},
        "names": ["deer", "red hat"],
        "re": re,
    }
    pages = ["README.md", "docs/reference/evaluation.md"]
    pages += [f"docs/howto/{name}.md" for name in ("search", "short_queries", "detection", "distill")]
    examples = [block for page in pages for block in code_blocks(ROOT / page, "python")]
    examples += [block for block in code_blocks(ROOT / "docs/howto/export.md", "python") if "MODEL/text" in block]
    assert len(examples) == 9
    for example in examples:
        exec(example, dict(variables))


def test_help_lists_each_command_once_and_each_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser, run = build_parser()
    parser.print_help()
    listed = re.findall(r"^  llm2clip ((?:\w+ \| )*\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert sorted(" | ".join(listed).split(" | ")) == sorted(run)
    for name in run:
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([name, "--help"])
        assert f"llm2clip [options] {name}" in capsys.readouterr().out


def test_documentation_has_commands() -> None:
    assert len(documented_commands()) > 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_links_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor and "." not in anchor:  # an anchor with dots is the name of a documented Python object
            headings = re.findall(r"^#+ (.*)", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}#{anchor}"


def test_quoted_messages_are_in_the_code() -> None:
    """Each message in docs/howto/troubleshooting.md occurs in src, where `…` stands for the values that it contains."""
    page = (ROOT / "docs/howto/troubleshooting.md").read_text()
    messages = re.findall(r"^- `([^`]+)`:", page, re.MULTILINE)
    assert len(messages) > 30
    texts = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    code = "\n".join(texts)
    assert [message for message in messages if message not in code] == []


def test_files_in_contributing_exist() -> None:
    """Every file and folder that CONTRIBUTING.md names in backticks exists, in src/llm2clip or in the repository."""
    names = re.findall(r"`([\w/.]+(?:\.py|/))`", CONTRIBUTING.read_text())
    assert len(names) > 40
    assert [n for n in names if not any((root / n).exists() for root in (ROOT, ROOT / "src/llm2clip"))] == []


def test_deployment_files_run_valid_commands() -> None:
    """The command line accepts the commands of the systemd unit, the container image and the compose services."""
    service = (ROOT / "deploy/llm2clip@.service").read_text()
    (service_command,) = re.findall(r"^ExecStart=\S+/llm2clip (.+)$", service.replace("%i", "7860"), re.MULTILINE)
    containerfile = (ROOT / "deploy/Containerfile").read_text()
    (container_command,) = re.findall(r"^CMD (\[.+\])$", containerfile, re.MULTILINE)
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    parser, _ = build_parser()
    for argv in (service_command.split(), json.loads(container_command), services["serve"]["command"]):
        assert parser.parse_args(argv).serve.index
    assert parser.parse_args(services["index"]["command"]).index.out == services["serve"]["command"][1]


def test_containers_install_extras_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"^ARG EXTRAS=(.+)$", (ROOT / "deploy/Containerfile").read_text(), re.MULTILINE)
    assert len(installed) == 2
    for names in installed:
        assert set(names.split(",")) <= extras.keys() - {"photos"}, "pillow-heif is under the GPL"
    howto = (ROOT / "docs/howto/operations.md").read_text()
    (documented,) = re.findall(r"--build-arg EXTRAS=([\w,-]+)", howto)
    assert set(documented.split(",")) == {*installed[0].split(","), "photos", "remote"}


def test_workflows_run_make_targets_and_all_checks_of_the_ci_script() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {}
    for name in ("ci", "audit"):
        workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
        steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
        used[name] = {step.removeprefix("make ") for step in steps if step.startswith("make ")}
    script_targets = set(re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert script_targets <= used["ci"] <= targets
    assert used["audit"] == {"audit"} <= targets - used["ci"], "release.yml runs ci.yml, so ci.yml must not audit"
