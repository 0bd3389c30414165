// The OpenAI SDK for Node against a gateway whose address is the first argument.

import OpenAI, { toFile } from "openai";

const base = process.argv[2];
const messages = [{ role: "user", content: "Say hello" }];
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "sk-clients", maxRetries: 0 });

function check(fact, what) {
  if (!fact) throw new Error(`not so: ${what}`);
}

async function raises(kind, status, call, what) {
  try {
    await call();
  } catch (error) {
    check(error instanceof kind && error.status === status, `${what}: ${error}`);
    return error;
  }
  throw new Error(`not so: ${what} is an error`);
}

const models = await client.models.list();
check(models.data.map((model) => model.id).join() === "chat,embed,gpt-4o", "models are listed");
const answer = await client.chat.completions.create({ model: "chat", messages });
check(answer.choices[0].message.content === "Say hello", "a whole answer");
let text = "";
for await (const chunk of await client.chat.completions.create({ model: "gpt-4o", messages, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
}
check(text === "Say hello", "a stream");
const embeddings = await client.embeddings.create({ model: "embed", input: ["a", "b"] });
check(embeddings.data[1].embedding.join() === "0.5,0.25", "embeddings");
const sound = await toFile(Buffer.alloc(400_000), "a.wav");
const transcription = await client.audio.transcriptions.create({ file: sound, model: "chat" });
check(transcription.text === "model=chat file=400000", "a transcription, its model behind the file");
const file = await client.files.create({ file: await toFile(Buffer.alloc(1000), "d"), purpose: "batch" });
check(file.bytes === 1000, "an upload");
const ask = (model, more) => () => client.chat.completions.create({ model, messages, ...more });
await raises(OpenAI.NotFoundError, 404, ask("none"), "an unknown model");
await raises(OpenAI.RateLimitError, 429, ask("chat", { user: "status-429" }), "a limit");
await raises(OpenAI.InternalServerError, 504, ask("chat", { user: "hang" }), "a slow backend");
try {
  const broken = await client.chat.completions.create({ model: "chat", messages, stream: true, user: "cut" });
  for await (const _ of broken);
  check(false, "a stream that breaks is an error");
} catch (error) {
  check(String(error).includes("interrupted"), `a stream that breaks says so: ${error}`);
}
console.log("all fine");
