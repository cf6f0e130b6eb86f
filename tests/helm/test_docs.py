"""What the README says about the chart can be done."""

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import json_format

from protos import inference_pb2, inference_pb2_grpc
from tests.helm.chart import CHART, ROOT, helm

SECTION = (ROOT / "README.md").read_text().split("## On Kubernetes", 1)[1].split("\n## ", 1)[0]
COMMANDS = re.sub(r"\\\n\s*", "", SECTION.split("```")[1]).splitlines()


def test_the_request_of_grpcurl_is_one() -> None:
    (command,) = (each for each in COMMANDS if each.startswith("grpcurl"))
    words = shlex.split(command)
    request = json_format.ParseDict(
        json.loads(words[words.index("-d") + 1]), inference_pb2.GenerateRequest()
    )
    assert request.text and request.stopping.max_tokens == 32
    service, _, method = words[-1].partition("/")
    assert service == inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
    assert method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods_by_name


@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if " helm/model1 " in each and each.startswith("helm")]
)
def test_the_commands_of_helm_render(command: str) -> None:
    words = shlex.split(command, comments=True)
    flags = [f"--set={words[n + 1]}" for n, word in enumerate(words) if word == "--set"]
    flags += ["-f", str(CHART / "values-laptop.yaml")]
    done = helm("template", words[2], CHART, *flags)
    assert done.code == 0, done.stderr
    # What the commands after it name.
    for service in set(re.findall(r"svc/(\S+)", SECTION)):
        assert f"name: {service}\n" in done.stdout


def test_the_client_in_python_prints_what_it_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    class Echo(inference_pb2_grpc.InferenceServicer):
        def GenerateStream(self, request, context):
            yield inference_pb2.GenerateStreamResponse(accepted=inference_pb2.Accepted())
            for word in request.text.split():
                delta = inference_pb2.Delta(text=f"{word} ")
                yield inference_pb2.GenerateStreamResponse(delta=delta)

    server = grpc.server(ThreadPoolExecutor(1))
    inference_pb2_grpc.add_InferenceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = SECTION.split("```python\n")[1].split("```")[0]
    exec(compile(client.replace("localhost:50051", f"127.0.0.1:{port}"), "README.md", "exec"), {})
    server.stop(0).wait()
    assert capsys.readouterr().out == "Once upon a time, "
