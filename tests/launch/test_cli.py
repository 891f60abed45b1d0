"""The `dejavu` command as a user meets it: answers on standard output, mistakes in one line and status 2."""

import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from command import last_object
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from dejavu.launch import cli, commands, options, ranks
from dejavu.parallel.watchdog import LOST_PEER, SILENT_PEER, note_error, timeout_s
from dejavu.runtime.preemption import PREEMPTED
from dejavu.runtime.weights import find_model
from models import make_model

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dejavu(monkeypatch, capfd):
    """Runs the command in this process: (status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dejavu", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capfd.readouterr()
        return exit.value.code or 0, out, err

    return run


def subprocess_dejavu(*arguments, **options):
    command = [sys.executable, "-m", "dejavu.launch.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def assert_one_clear_line(status, err, message):
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert status == 2


def test_generate_streams_the_prompt_and_its_text(dejavu):
    status, out, err = dejavu("generate", "--prompt", "The old man", "--max-new-tokens", 12, *CPU)
    assert status == 0
    assert out.startswith("The old man ") and len(out.split()) > 8
    assert "12 tokens" in err and "ms/token" in err and "GB/s" in err


def test_generate_json_is_one_object_on_the_last_line(dejavu, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffOnce\n\nThe sea\r\nHe\u2028said\n".encode())
    status, out, _ = dejavu(
        "generate", "--prompt-file", prompts, "--json", "--max-new-tokens", 5, "--max-batch", 2, *CPU
    )
    answer = json.loads(out.splitlines()[-1])
    assert status == 0
    assert [r["prompt"] for r in answer["results"]] == ["Once", "The sea", "He\u2028said"]
    assert set(answer["results"][0]) == {"prompt", "text", "token_ids", "finish_reason"}
    assert set(answer) == {
        "results", "ttft_ms", "ms_per_token", "tokens_per_s", "weight_bytes", "gb_per_s",
        "density", "policy", "drift", "pp", "tp", "dtype", "device", "preempted",
    }  # fmt: skip
    assert set(answer["ms_per_token"]) == {"mean", "p50", "p99"}


def run_on_a_terminal(command):
    """What the command shows on a standard error that is a terminal."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while piece := os.read(ours, 4096):
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    return shown.decode()


def test_loading_shows_a_bar_on_a_terminal_alone(dejavu):
    generate = ("generate", "--prompt", "Once", "--max-new-tokens", "1", *CPU)
    shown = run_on_a_terminal([sys.executable, "-m", "dejavu.launch.cli", *generate])
    assert "loading" in shown and "/30.5 MB" in shown
    assert "loading" not in dejavu(*generate)[2]


def test_a_prompt_without_a_text_is_shown_all_the_same(dejavu):
    status, out, _ = dejavu("generate", "--prompt", "The king", "--max-new-tokens", "1", "--stop", ",", *CPU)
    free = dejavu("generate", "--prompt", "The king", "--max-new-tokens", "1", *CPU)[1]
    assert (status, out) == (0, "The king\n") and free.startswith("The king,")


def test_several_prompts_are_shown_one_after_the_other(dejavu):
    status, out, _ = dejavu("generate", "--prompt", "Once", "--prompt", "The", "--max-new-tokens", 2, *CPU)
    assert status == 0 and "[1] Once" in out and "[2] The" in out


def test_stop_strings_and_sampling_reach_the_engine(dejavu):
    base = ("generate", "--prompt", "Once", "--max-new-tokens", 30, "--json", *CPU)
    greedy = json.loads(dejavu(*base)[1])["results"][0]
    stopped = json.loads(dejavu(*base, "--stop", greedy["text"][5:9])[1])["results"][0]
    drawn = json.loads(dejavu(*base, "--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--seed", 5)[1])
    assert stopped["finish_reason"] == "stop" and len(stopped["text"]) < len(greedy["text"])
    assert drawn["results"][0]["text"] != greedy["text"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "x", "--model", "no-such-model"], "no such model: 'no-such-model'"),
        (["--prompt", "x", "--model", "nobody/nothing"], "the hub cannot be reached"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "word " * 1100], "1024 positions"),
        (["--prompt", "x", "--max-new-tokens", "5000"], "max_new_tokens=5000 do not fit"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0 is less than 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 is not in [0, 1e6]"),
        (["--prompt", "x", "--temperature", "warm"], "--temperature"),
        (["--prompt", "x", "--dtype", "fp64"], "dtype='fp64' is unknown"),
        (["--prompt", "x", "--device", "tpu"], "device=tpu is unknown"),
        (["--prompt", "x", "--max-batch", "0"], "--max-batch"),
        (["--prompt", "x", "--pp", "2"], "pp=2: 1 rank(s) cannot be dealt into 2 stages; 1 would work"),
        (["--prompt", "x", "--no-such-option"], "--no-such-option"),
        ([], "give one of --prompt, --prompt-file and --stdin"),
        (["--stdin", "--json"], "--stdin answers in JSON lines by itself"),
        (["--stdin", "--max-batch", "0"], "--max-batch"),
        (["--prompt", "x", "--stdin"], "give one of --prompt, --prompt-file and --stdin"),
        (["--prompt-file", "no-such-file"], "cannot read no-such-file: No such file"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(dejavu, arguments, message):
    if "--device" not in arguments:
        arguments = [*arguments, *CPU]
    status, out, err = dejavu("generate", *arguments)
    assert_one_clear_line(status, err, message)
    assert out == ""


def test_cuda_asked_for_and_absent(dejavu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = dejavu("generate", "--prompt", "x", "--device", "cuda")
    assert_one_clear_line(status, err, "no CUDA device here")


def test_a_file_without_prompts(dejavu, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    status, _, err = dejavu("generate", "--prompt-file", tmp_path / "empty.txt", *CPU)
    assert_one_clear_line(status, err, "empty.txt has no prompts")


def test_only_rank_0_speaks(dejavu, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert dejavu("generate", *CPU) == (2, "", "")


def test_no_command_shows_the_help(dejavu):
    status, out, err = dejavu()
    assert status == 2 and "generate" in out + err and "error:" not in err


def answers(out):
    return [json.loads(line) for line in out.splitlines()]


REQUESTS = [
    {"id": 1, "prompt": "Once", "max_new_tokens": 3},
    {"id": "two", "prompt": "The sea", "max_new_tokens": 6, "temperature": 1.0, "seed": 4},
    {"id": 3, "prompt": ""},
    {"prompt": "no id", "stop": [" "]},
    {"id": 5, "prompt": "x", "colour": "red"},
    {"id": 6, "prompt": "x", "top_p": 2},
]


def stream(extra=()):
    return "".join([*(json.dumps(r) + "\n" for r in REQUESTS), *extra])


def check_answers(found):
    assert [a.get("id") for a in found[:6]] == [1, "two", 3, None, 5, 6]
    assert [len(a.get("token_ids", [])) for a in found[:2]] == [3, 6]
    assert found[2]["error"] == "the prompt is empty"
    assert found[3]["finish_reason"] == "stop"
    assert found[4]["error"] == "unknown fields: colour"
    assert found[5]["error"] == "top_p=2 is not in (0, 1]"


WRONG_LINES = {
    b"not json": "the line is not JSON",
    b"[1]": "not a JSON object",
    b"\xff": "can't decode byte",
    b"[" * 100_000: "recursion",
    b'{"prompt": "a\\ud800"}': "not valid Unicode",
    b'{"id": "\\ud800", "prompt": 3}': "no string but a int",
    b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}": "temperature=",
    b'{"prompt": "x", "top_k": 9223372036854775808}': "top_k=9223372036854775808",
}


@pytest.mark.parametrize("max_batch", [1, 4])
def test_stdin_answers_each_line_in_order(dejavu, monkeypatch, max_batch):
    lines = b"\xef\xbb\xbf" + stream().encode() + b"\n" + b"\n".join(WRONG_LINES) + b"\n" + stream().encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    status, out, _ = dejavu("generate", "--stdin", "--max-batch", max_batch, *CPU)
    found = answers(out)
    assert status == 0 and len(found) == 2 * len(REQUESTS) + len(WRONG_LINES)
    check_answers(found)
    for answer, message in zip(found[len(REQUESTS) :], WRONG_LINES.values(), strict=False):
        assert message in answer["error"]
    check_answers(found[-len(REQUESTS) :])


def test_stdin_answers_before_the_input_ends():
    command = [sys.executable, "-m", "dejavu.launch.cli", "generate", "--stdin", *CPU]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for i in range(2):
            process.stdin.write(json.dumps({"id": i, "prompt": "Once", "max_new_tokens": 2}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == i
        process.stdin.close()
        assert process.wait() == 0


def test_launch_gives_two_ranks_the_text_of_one(dejavu):
    generate = ("generate", "--prompt", "The old man", "--json", "--max-new-tokens", 40, *CPU)
    run = subprocess_dejavu("launch", "--nproc-per-node", 2, *generate)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    two, one = json.loads(run.stdout), json.loads(dejavu(*generate)[1])
    assert two["results"] == one["results"]
    assert (two["tp"], one["tp"]) == (2, 1)
    assert two["weight_bytes"] < 0.6 * one["weight_bytes"]


@pytest.mark.parametrize("options", [(), ("--pp", 2)])
def test_launch_serves_a_stream_on_two_ranks(options):
    generate = ("generate", "--stdin", *options, *CPU)
    run = subprocess_dejavu("launch", "--nproc-per-node", 2, *generate, input=stream())
    assert run.returncode == 0, run.stderr
    check_answers(answers(run.stdout))


# A node's launcher that looks for the other's end late: the store on the first node has gone with it by then.
LATE = """
import time
from dejavu.launch import cli
from torch.distributed.elastic.utils import store

def late(*args, check_in=store._barrier_nonblocking, **kwargs):
    key = check_in(*args, **kwargs)
    time.sleep(2)
    return key

store._barrier_nonblocking = late
cli.main()
"""


@pytest.mark.parametrize("second", [("-m", "dejavu.launch.cli"), ("-c", LATE)], ids=["on time", "late"])
def test_two_nodes_are_two_stages(dejavu, monkeypatch, second):
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")  # of this process, which has imported `dejavu.launch`
    generate = ("generate", "--prompt", "The old man", "--max-new-tokens", 10, *CPU)
    options = ["launch", "--nnodes", "2", "--nproc-per-node", "1"]
    options += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    nodes = [
        subprocess.Popen(
            [sys.executable, *program, *options, "--node-rank", str(node), *map(str, generate), "--pp", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, program in enumerate([("-m", "dejavu.launch.cli"), second])
    ]
    (out, err), others = (node.communicate() for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0]
    assert out == dejavu(*generate)[1] and "2 rank(s) of cpu, float32, 2 stages" in err
    assert others == ("", "")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_more_ranks_than_the_model_can_use(model_dir):
    run = subprocess_dejavu(
        "launch", "--nproc-per-node", 3, "generate", "--model", model_dir, "--prompt", "x", *CPU
    )
    assert_one_clear_line(run.returncode, run.stderr, "cannot be split over 3 ranks; 1, 2, 4 would work")


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_under_launch(taken_port):
    run = subprocess_dejavu("launch", "--nproc-per-node", 2, "--master-port", taken_port, "demo", *CPU)
    assert_one_clear_line(run.returncode, run.stderr, f"port {taken_port} is in use")


def test_a_port_in_use_without_a_launcher(taken_port):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port), "RANK": "0", "WORLD_SIZE": "2"}
    run = subprocess_dejavu("generate", "--prompt", "x", *CPU, env={**os.environ, **environment})
    assert_one_clear_line(run.returncode, run.stderr, f"127.0.0.1:{taken_port}: its port is in use")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--no-such-option"], "--no-such-option"),
        (["--nproc-per-node", "0"], "starts nothing"),
        ([], "COMMAND"),
    ],
)
def test_launch_options_that_are_wrong(dejavu, options, message):
    status, _, err = dejavu("launch", *options, *(["demo"] if options else []))
    assert_one_clear_line(status, err, message)


@pytest.mark.parametrize(
    "options, message",
    [
        (["mlp", "--shape", "opt-7b"], "shape='opt-7b' is unknown: use opt-125m"),
        (["mlp", "--shape", "opt-175b:5"], "num_heads=96 and ffn_dim=49152 cannot be split over 5 ranks"),
        (["mlp", "--shape", "opt-175b:two"], "shape='opt-175b:two': expected NAME or NAME:RANKS"),
        (["attention", "--weights", "int4"], "weights='int4' is unknown: use fp16, bf16, fp8, int8"),
        (["predictor", "--rank", "0"], "--rank"),
        (["mlp", "--tune", "--batch", "40"], "--tune is for one token, or for up to 16"),
        *([] if torch.cuda.is_available() else [(["mlp"], "torch sees no CUDA device here")]),
    ],
)
def test_bench_options_that_are_wrong(dejavu, options, message):
    status, _, err = dejavu("bench", *options)
    assert_one_clear_line(status, err, message)


def test_nodes_that_do_not_meet(dejavu, monkeypatch):
    def run(args):
        raise RendezvousConnectionError("the connection has failed")

    monkeypatch.setattr(ranks, "run", run)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    status, _, err = dejavu("launch", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29500", "demo")
    assert_one_clear_line(
        status, err, "cannot meet the other nodes at localhost:29500: the connection has failed"
    )


@pytest.mark.parametrize(
    "where",
    [("--rdzv-backend", "c10d", "--rdzv-endpoint", "node-a:29500"), ("--master-addr", "node-a")],
)
def test_a_meeting_place_that_does_not_exist(dejavu, monkeypatch, where):
    def getaddrinfo(host, port):
        raise socket.gaierror(socket.EAI_NONAME, f"{host} is not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    status, _, err = dejavu("launch", "--nnodes", 2, *where, "demo")
    assert_one_clear_line(status, err, "cannot meet the other nodes at node-a: node-a is not known")


def process_of_rank(launcher, rank):
    """The process id of a rank, by its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue  # it has gone meanwhile, or is not ours
        if parent == launcher and b"RANK=%d" % rank in environment:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)]


def aloud(device):
    # a GPU has soon said all to one prompt
    prompts = ("--prompt", "x") if device == "cpu" else ("--stdin", "--max-batch", "1")
    return ("generate", *prompts, "--max-new-tokens", "1000", "--ignore-eos", "--device", device)


@contextlib.contextmanager
def generating(*launch, device="cpu", **environment):
    """The command, with its first text out already."""
    command = [sys.executable, "-m", "dejavu.launch.cli", *launch, *aloud(device)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, **environment}
    with subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes) as process:
        try:
            process.stdin.write('{"prompt": "x"}\n' * 50)
            process.stdin.flush()
            first = process.stdout.read(1)
            assert first == ("x" if device == "cpu" else "{"), process.stderr.read()
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of it, if something went wrong


TWO_RANKS = ("launch", "--nproc-per-node", "2")


@pytest.mark.parametrize("device", DEVICES)
def test_launch_names_the_rank_that_dies_in_the_middle(device):
    with generating(*TWO_RANKS, device=device) as process:
        killed = process_of_rank(process.pid, 1)
        os.kill(killed, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + 9
    assert err.splitlines() == [f"error: rank 1 (process {killed}) died: SIGKILL"]


@pytest.mark.parametrize("device", DEVICES)
def test_launch_names_the_rank_that_hangs(device):
    with generating(*TWO_RANKS, device=device, DEJAVU_TIMEOUT="3") as process:
        survivor, hung = (process_of_rank(process.pid, rank) for rank in (0, 1))
        os.kill(hung, signal.SIGSTOP)
        _, err = process.communicate(timeout=60)
    assert process.returncode == SILENT_PEER
    said = "lost another rank: rank 1 has given no sign of life for 5 s"
    assert err.splitlines() == [f"error: rank 0 (process {survivor}) {said}"]


def test_without_a_launcher_the_survivor_says_that_it_lost_a_rank():
    with contextlib.ExitStack() as stack:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "dejavu.launch.cli", *aloud("cpu")]
        second = stack.enter_context(subprocess.Popen(command, env={**os.environ, **place, "RANK": "1"}))
        first = stack.enter_context(generating(**place, RANK="0"))
        second.kill()
        _, err = first.communicate(timeout=60)
    assert first.returncode == LOST_PEER
    assert err.startswith("error: rank 0: lost another rank: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_two_ranks_end_the_text_where_it_is(number, device):
    with generating(*TWO_RANKS, device=device) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    if device == "cpu":
        assert out.endswith("\n") and " tokens | first after" in err and len(err.splitlines()) == 1
    else:
        assert last_object(out)["finish_reason"] == "preempted" and err == ""


def test_launch_says_what_the_first_rank_to_fail_has_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert note_error("no such thing")
    silenced = ProcessFailure(0, 11, -signal.SIGTERM, str(tmp_path / "none"))  # by torchrun, before a word
    failed = ProcessFailure(1, 12, 2, str(tmp_path / "error.json"))
    assert ranks._report(ChildFailedError("dejavu", {0: silenced, 1: failed}), []) == 2
    assert capsys.readouterr().err == "error: no such thing\n"


# a shell's background jobs ignore Ctrl-C, as would all that they start
HEEDS = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


def test_what_the_launcher_says_of_itself():
    helped = subprocess_dejavu("launch", "--help")
    assert "usage: dejavu launch [OPTIONS] COMMAND" in helped.stdout and "--rdzv-endpoint" in helped.stdout
    nothing = subprocess_dejavu("launch", "--nproc-per-node", 2)
    assert_one_clear_line(nothing.returncode, nothing.stderr, "required: COMMAND")


def test_the_version(dejavu):
    status, out, err = dejavu("--version")
    assert (status, out, err) == (0, f"dejavu {version('dejavu')}, torch {version('torch')}\n", "")


def test_ctrl_c_before_anything_runs_ends_without_a_word():
    command = [sys.executable, "-m", "dejavu.launch.cli", *aloud("cpu")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=HEEDS) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text():  # until amid its imports
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "" and process.returncode in (-signal.SIGINT, 130)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGUSR1, PREEMPTED), (signal.SIGINT, 130)]
)
def test_launch_that_is_told_while_it_waits_for_other_nodes(number, status):
    port = free_port()
    where = ("--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", str(port))
    command = [sys.executable, "-m", "dejavu.launch.cli", "launch", *where, *aloud("cpu")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=HEEDS) as process:
        while process.poll() is None:  # until it is there to be met
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == status and err == ""


@pytest.mark.parametrize("launch", [(), ("launch", "--nproc-per-node", "2")])
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_full_disk_is_said_in_one_line(launch, form):
    generate = ("generate", "--prompt", "Once", "--max-new-tokens", "4", *form, *CPU)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dejavu.launch.cli", *launch, *generate]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert_one_clear_line(run.returncode, run.stderr, "No space left on device")


def test_what_the_system_refuses_one_rank_alone(monkeypatch, dejavu, tmp_path):
    def refused(*_, **__):
        raise OSError(28, "No space left on device", "shard-3")

    monkeypatch.setattr(commands, "_prompts", refused)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dejavu("generate", "--prompt", "x") == (2, "", "error: rank 3: shard-3: No space left on device\n")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "note"))
    assert dejavu("generate", "--prompt", "x") == (2, "", "")
    assert "shard-3: No space" in (tmp_path / "note").read_text()


def test_a_reader_that_has_gone():
    generate = ("generate", "--prompt", "Once", "--max-new-tokens", "4", "--json", *CPU)
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-m", "dejavu.launch.cli", *generate], stdout=write, stderr=-1)
    os.close(write)
    assert run.returncode == 1 and run.stderr == b""


def test_a_log_has_a_line_of_progress_now_and_then(monkeypatch, capfd):
    monkeypatch.setattr(options, "_LOG_EVERY_S", 0.0)
    with options.bar("training") as on_progress:
        on_progress(1, 8)
        on_progress("the second stage", 8, 8)
    assert capfd.readouterr().err.split("\n") == ["training: 12%", "the second stage: 100%", ""]


def test_a_stream_that_is_told_to_stop_ends_when_it_has_answered():
    command = [sys.executable, "-m", "dejavu.launch.cli", "generate", "--stdin", *CPU]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for tokens in (2, 1000):
            request = {"id": tokens, "prompt": "Once", "max_new_tokens": tokens, "ignore_eos": True}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            if tokens == 2:
                assert json.loads(process.stdout.readline())["finish_reason"] == "length"
        process.send_signal(signal.SIGUSR1)
        out = process.stdout.read()
        assert process.wait(timeout=60) == PREEMPTED
    assert [(a["id"], a["finish_reason"]) for a in answers(out)] in ([], [(1000, "preempted")])


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan"])
def test_a_timeout_that_is_none(monkeypatch, text):
    monkeypatch.setenv("DEJAVU_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"DEJAVU_TIMEOUT={text}: expected seconds, 1 or more"):
        timeout_s()


def test_the_demo_shows_dense_and_sparse_side_by_side(dejavu):
    assert (find_model("demo") / "README.md").is_file()
    status, out, _ = dejavu("demo", *CPU)
    assert status == 0 and "stormy night" in out
    assert "lossless" in out and "predicted" in out and "dejavu train" in out
