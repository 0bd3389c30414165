"""The OpenAI SDK against a gateway whose address is the first argument."""

import sys

import openai

base = sys.argv[1]
messages = [{"role": "user", "content": "Say hello"}]


def client(pool, **settings):
    return openai.OpenAI(base_url=f"{base}/{pool}/v1", api_key="any", max_retries=0, **settings)


def check(fact, what):
    if not fact:
        sys.exit(f"not so: {what}")


chat = client("demo/chat")
check(chat.models.list().data[0].id == "chat", "models are listed")

answer = chat.chat.completions.create(model="chat", messages=messages)
check("Say hello" in answer.choices[0].message.content, "a whole answer")
check(answer.usage.total_tokens > 0, "usage of a whole answer")
check(len(answer._request_id) == 32, "the request id reaches the SDK")

pieces, usage = [], None
stream = chat.chat.completions.create(
    model="chat", messages=messages, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        pieces.append(chunk.choices[0].delta.content)
    usage = chunk.usage or usage
check(len(pieces) > 3 and "Say hello" in "".join(pieces), "a streamed answer, in pieces")
check(usage and usage.completion_tokens == len(pieces), "usage of a streamed answer")

try:
    client("demo/nope").chat.completions.create(model="x", messages=messages)
    check(False, "an unknown model is an error")
except openai.NotFoundError as error:
    check(error.code == "model_not_found", "the error has its code")

print("all fine")
