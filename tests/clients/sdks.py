"""The Python SDKs against a gateway whose address is the first argument, changing only the base URL."""

import asyncio
import base64
import io
import sys

import anthropic
import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

base = sys.argv[1]
key = "sk-clients"
messages = [{"role": "user", "content": "Say hello"}]


def check(fact, what):
    if not fact:
        sys.exit(f"not so: {what}")


def raises(kind, status, call, what):
    try:
        call()
    except kind as error:
        check(getattr(error, "status_code", None) == status, f"{what}: {error!r}")
        return error
    sys.exit(f"not so: {what} is an error")


client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)

# Names of models.
check([model.id for model in client.models.list()] == ["chat", "embed", "gpt-4o"], "models are listed")
check(client.models.retrieve("chat").owned_by == "svc", "a model is described")
raises(openai.NotFoundError, 404, lambda: client.models.retrieve("none"), "a model that is not there")

# Chat: whole, streamed, with tools, with a picture of 5 MB.
answer = client.chat.completions.create(model="chat", messages=messages)
check(answer.choices[0].message.content == "Say hello", "a whole answer")
check(len(answer._request_id) == 32, "the request id reaches the SDK")
alias = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=messages)
check(alias.headers["x-tollgate-model"] == "svc/chat", "an answer tells its model")
check(alias.parse().model == "chat", "an alias is what it stands for at the backend")
stream = client.chat.completions.create(model="chat", messages=messages, stream=True)
check("".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Say hello", "a stream")
tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
answer = client.chat.completions.create(model="chat", messages=messages, tools=tools)
check(answer.choices[0].message.tool_calls[0].function.name == "add", "a tool is called")
picture = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 15_000).decode()
parts = [{"type": "text", "text": "big"}, {"type": "image_url", "image_url": {"url": picture}}]
answer = client.chat.completions.create(model="chat", messages=[{"role": "user", "content": parts}])
check(int(answer.choices[0].message.content) > 5_000_000, "a picture of 5 MB")

# The other APIs.
embeddings = client.embeddings.create(model="embed", input=["a", "b"])
check(embeddings.data[1].embedding == [0.5, 0.25], "embeddings")
check(client.responses.create(model="chat", input="hi").output_text == "hi", "a response")
check(client.moderations.create(model="chat", input="x").results[0].flagged is False, "moderation")
speech = client.audio.speech.create(model="chat", voice="alloy", input="x").read()
check(speech == bytes(range(256)), "speech is binary")
sound = io.BytesIO(b"RIFF" * 100_000)
sound.name = "a.wav"
text = client.audio.transcriptions.create(model="chat", file=sound).text
check(text == "model=chat file=400000", "a transcription")
data = io.BytesIO(b"{}\n" * 50_000)
data.name = "data.jsonl"
file = client.files.create(file=data, purpose="fine-tune")
check(file.bytes == 150_000, "an upload of a file")
check(client.files.content(file.id).read() == b"content", "the content of a file")
check(client.files.delete(file.id).deleted, "a file is deleted")

# Errors are the exceptions that the SDK documents.
bad = openai.OpenAI(base_url=f"{base}/v1", api_key="sk-wrong", max_retries=0)
ask = lambda model, **more: client.chat.completions.create(model=model, messages=messages, **more)
raises(openai.AuthenticationError, 401, lambda: bad.models.list(), "a wrong key")
error = raises(openai.NotFoundError, 404, lambda: ask("none"), "an unknown model")
check(error.code == "model_not_found" and error.request_id, "an error has code and request id")
client.chat.completions.create(model="chat", messages=messages)
raises(openai.RateLimitError, 429, lambda: ask("chat", user="status-429"), "a limit of the backend")
raises(openai.InternalServerError, 500, lambda: ask("chat", user="status-500"), "a broken backend")
raises(openai.InternalServerError, 504, lambda: ask("chat", user="hang"), "a slow backend")
try:
    client.with_options(timeout=0.3).chat.completions.create(
        model="chat", messages=messages, user="hang"
    )
    check(False, "the client's own timeout is an error")
except openai.APITimeoutError:
    pass
try:
    for _ in client.chat.completions.create(
        model="chat", messages=messages, stream=True, user="cut"
    ):
        pass
    check(False, "a stream that breaks is an error")
except openai.APIError as error:
    check("interrupted" in str(error), f"a stream that breaks says so: {error!r}")


async def asynchronous():
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=key) as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="chat", messages=messages) for _ in range(20))
        )
    check(all(answer.choices[0].message.content == "Say hello" for answer in answers), "20 at once")


asyncio.run(asynchronous())

azure = openai.AzureOpenAI(azure_endpoint=base, api_key=key, api_version="2024-10-21")
answer = azure.chat.completions.create(model="gpt-4o", messages=messages)
check(answer.choices[0].message.content == "Say hello", "Azure's client")

# Anthropic.
claude = anthropic.Anthropic(base_url=base, api_key=key, max_retries=0)
message = claude.messages.create(model="chat", max_tokens=9, messages=messages)
check(message.content[0].text == "Say hello", "a message")
with claude.messages.stream(model="chat", max_tokens=9, messages=messages) as stream:
    check("".join(stream.text_stream) == "Say hello", "a streamed message")
check(claude.messages.count_tokens(model="chat", messages=messages).input_tokens == 2, "a count")
check([model.id for model in claude.models.list()][0] == "chat", "models are listed for Anthropic")
error = raises(
    anthropic.NotFoundError,
    404,
    lambda: claude.messages.create(model="none", max_tokens=9, messages=messages),
    "an unknown model of Anthropic's",
)
check(error.body["error"]["type"] == "not_found_error", "an error in Anthropic's shape")

# Answers that are kept.
def given(create, text, **more):
    answer = create(messages=messages, model="chat", extra_body={"temperature": 0}, **more)
    return answer.headers["x-cache"], text(answer.parse())


def words(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


chats = client.chat.completions.with_raw_response.create
whole = [given(chats, lambda it: it.choices[0].message.content) for _ in range(2)]
check(whole == [("miss", "Say hello"), ("hit", "Say hello")], f"a kept answer: {whole}")
streamed = [given(chats, words, stream=True) for _ in range(2)]
check(streamed == [("miss", "Say hello"), ("hit", "Say hello")], f"a kept stream: {streamed}")
kept = claude.messages.with_raw_response.create
whole = [given(kept, lambda it: it.content[0].text, max_tokens=9) for _ in range(2)]
check(whole == [("miss", "Say hello"), ("hit", "Say hello")], f"a kept message: {whole}")
again = client.embeddings.with_raw_response.create(model="embed", input=["a", "b"])
check(again.headers["x-cache"] == "hit", "kept embeddings")
check(again.parse().data[1].embedding == [0.5, 0.25], "kept embeddings are the same")


async def at_once():
    async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=key) as client:
        create = client.chat.completions.with_raw_response.create
        ask = lambda: create(model="chat", messages=messages, temperature=0, seed=1)
        answers = await asyncio.gather(*(ask() for _ in range(20)))
    outcomes = sorted(answer.headers["x-cache"] for answer in answers)
    check(outcomes == ["hit"] * 19 + ["miss"], f"one request for 20: {outcomes}")


asyncio.run(at_once())

# LangChain.
chain = ChatOpenAI(base_url=f"{base}/v1", api_key=key, model="chat")
check(chain.invoke([HumanMessage("Say hello")]).content == "Say hello", "LangChain, whole")
pieces = [piece.content for piece in chain.stream([HumanMessage("Say hello")])]
check("".join(pieces) == "Say hello" and len(pieces) > 1, "LangChain, streamed")
vectors = OpenAIEmbeddings(
    base_url=f"{base}/v1", api_key=key, model="embed", check_embedding_ctx_length=False
)
check(vectors.embed_documents(["a", "b"])[1] == [0.5, 0.25], "LangChain, embeddings")

print("all fine")
