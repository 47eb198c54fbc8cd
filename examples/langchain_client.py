"""LangChain's ChatOpenAI in front of a lazyllm server.

    lazyllm serve --model PATH --preset recommended --preset dense
    python examples/langchain_client.py --base-url http://127.0.0.1:8000/v1
    python examples/langchain_client.py --serve      # starts a server with the packaged SmolLM2, and ends it again

The server speaks OpenAI's API, so any client of that will do. What is lazyllm's own stands under one key: `lazyllm` in
a request names the policy and what the prompt asks, in the usage of a reply it tells what was computed. Needs
`pip install langchain-openai`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import typer
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

from lazyllm.evaluation.data import packaged_speech

SPEECH = "1985-Reagan-1"
QUESTION = "What is the name of the young woman who will graduate from West Point?"
FOLLOW_UP = "How much do taxpayers pay per passenger on Amtrak?"
PROMPT = ChatPromptTemplate.from_messages([("user", "{document}\n\n{question}")])
POLICIES = ["recommended", "dense"]
START_SECONDS = 120
"""How long a server may take to load its model."""


def main(
    base_url: Annotated[str, typer.Option(help="Where the server's API is.")] = "http://127.0.0.1:8000/v1",
    serve: Annotated[bool, typer.Option("--serve", help="Start a server there, and end it again.")] = False,
    api_key: Annotated[str, typer.Option(help="The server's key, where it has one.")] = "none",
    policy: Annotated[list[str], typer.Option(help="Policies of the server; may be repeated.")] = POLICIES,
    question: Annotated[str, typer.Option(help="What to ask about an address of 1985.")] = QUESTION,
    follow_up: Annotated[str, typer.Option(help="What to ask then, as a stream.")] = FOLLOW_UP,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 24,
) -> None:
    document = packaged_speech(SPEECH)
    with server(base_url, policy) if serve else nullcontext():
        print(f"> {question}")
        for name in policy:
            chain = PROMPT | client(base_url, api_key, name, question, max_tokens)
            show(name, chain.invoke({"document": document, "question": question}))
        print(f"> {follow_up}")
        chain = PROMPT | client(base_url, api_key, policy[0], follow_up, max_tokens) | StrOutputParser()
        for piece in chain.stream({"document": document, "question": follow_up}):
            print(piece, end="", flush=True)
        print()


def client(base_url: str, api_key: str, policy: str, query: str, max_tokens: int) -> ChatOpenAI:
    """A chat model whose requests name a policy, and what the prompt asks."""
    model = OpenAI(base_url=base_url, api_key=api_key).models.list().data[0].id
    return ChatOpenAI(
        base_url=base_url,
        api_key=api_key,
        model=model,
        temperature=0,
        max_completion_tokens=max_tokens,
        extra_body={"lazyllm": {"policy": policy, "query": query}},
    )


def show(policy: str, reply: BaseMessage) -> None:
    """The text, and what the usage says of it."""
    usage: dict[str, Any] = reply.response_metadata["token_usage"]
    cost = usage["lazyllm"]
    print(f"{reply.text.strip()}")
    print(
        f"  {policy}: {usage['prompt_tokens']:,} prompt tokens, first token after {cost['ttft_seconds']:.2f} s, "
        f"{cost['computed_fraction']:.0%} of the prompt computed, {cost['revived_tokens']:,} tokens revived"
    )


@contextmanager
def server(base_url: str, policies: list[str]) -> Iterator[None]:
    """A server with the packaged model, for as long as the context lasts."""
    at = urlsplit(base_url)
    command = [sys.executable, "-m", "lazyllm", "serve", "--dtype", "float32"]
    command += [part for policy in policies for part in ("--preset", policy)]
    with subprocess.Popen([*command, "--host", str(at.hostname), "--port", str(at.port)]) as process:
        try:
            wait_for(f"{at.scheme}://{at.netloc}/ready", process)
            yield
        finally:
            process.terminate()  # replies that are being made go on to their end


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Returns when the server takes requests."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(url):
                return
        except OSError:  # refused, or not ready yet
            time.sleep(0.2)
    raise SystemExit("the server did not start; what it said stands above")


if __name__ == "__main__":
    typer.run(main)
