// The official Node SDK, unmodified: does what its arguments name and prints what came of each as one JSON object.
import OpenAI from "openai";

const [chat, text, embedding, ...wanted] = process.argv.slice(2);
const told = { baseURL: `${process.env.TESSERA_URL}/v1`, apiKey: process.env.TESSERA_API_KEY, maxRetries: 0 };
const client = new OpenAI(told);
const stranger = new OpenAI({ ...told, apiKey: "no key at all" });
const messages = [{ role: "user", content: "Hello" }];

async function joined(stream) {
  let content = "", finish_reason = null, usage = null;
  for await (const part of stream) {
    for (const choice of part.choices) {
      content += choice.delta?.content ?? choice.text ?? "";
      finish_reason = choice.finish_reason ?? finish_reason;
    }
    usage = part.usage ?? usage;
  }
  return { content, finish_reason, total_tokens: usage?.total_tokens };
}

const whole = (answer) => ({
  content: answer.choices[0].message?.content ?? answer.choices[0].text,
  finish_reason: answer.choices[0].finish_reason,
  total_tokens: answer.usage.total_tokens,
});
const streamed = { stream: true, stream_options: { include_usage: true } };
const chatted = (more) => client.chat.completions.create({ model: chat, messages, ...more });

const operations = {
  models: async () => (await client.models.list()).data.map((model) => model.id),
  model: async () => (await client.models.retrieve(chat)).id,
  chat: async () => whole(await chatted({})),
  chat_stream: async () => joined(await chatted(streamed)),
  text: async () => whole(await client.completions.create({ model: text, prompt: "One" })),
  text_stream: async () => joined(await client.completions.create({ model: text, prompt: "One", ...streamed })),
  embeddings: async () => (await client.embeddings.create({ model: embedding, input: ["one", "two"] })).data.map((item) => item.embedding.length),
  unknown_model: () => chatted({ model: "no/such" }),
  unknown_model_stream: () => chatted({ model: "no/such", ...streamed }),
  no_messages: () => chatted({ messages: [] }),
  wrong_key: () => stranger.models.list(),
  stored: async () => {
    const made = await chatted({ store: true, metadata: { by: "node" } });
    const listed = (await client.chat.completions.list({ metadata: { by: "node" } })).data.map((found) => found.id);
    const kept = (await client.chat.completions.retrieve(made.id)).choices[0].message.content;
    const asked = (await client.chat.completions.messages.list(made.id)).data.map((message) => message.content);
    const relabelled = (await client.chat.completions.update(made.id, { metadata: { by: "nobody" } })).metadata.by;
    return { listed: listed.includes(made.id), kept, asked, relabelled, deleted: (await client.chat.completions.delete(made.id)).deleted };
  },
};

const results = {};
for (const name of wanted) {
  try {
    const answer = await operations[name]();
    results[name] = answer?.controller ? await joined(answer) : answer;
  } catch (error) {
    results[name] = { raised: error.constructor.name, status: error.status, code: error.code, param: error.param, type: error.type };
  }
}
console.log(JSON.stringify(results));
