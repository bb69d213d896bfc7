// Answers a request of llama_cpp.py with node-llama-cpp: node node_llama_cpp.js NODE_MODULES REQUEST.json ANSWER.json
"use strict";
const fs = require("fs");
const path = require("path");
const { pathToFileURL } = require("url");

const load = (folder) => {
  const described = JSON.parse(fs.readFileSync(path.join(folder, "package.json"), "utf8"));
  const main = [described.exports?.["."]?.import, described.exports?.import, described.module, described.main];
  const file = main.map((entry) => (typeof entry === "object" ? entry?.default : entry)).find((entry) => typeof entry === "string");
  return import(pathToFileURL(path.join(folder, file)).href);
};

async function greedy(sequence, ids, most) {
  await sequence.clearHistory();
  const reply = [];
  if (most > 0) {
    for await (const token of sequence.evaluate(ids, { temperature: 0 })) {
      reply.push(token);
      if (reply.length >= most) break;
    }
  }
  return reply;
}

// Logits of the wanted tokens after the prompt and after each token of the given reply.
async function logits(sequence, ids, reply, wanted) {
  const input = [...ids, ...reply].slice(0, ids.length + wanted.length - 1);
  const first = ids.length - 1;
  const items = input.map((token, at) =>
    at < first ? token : [token, { generateNext: { logits: { filter: { tokens: wanted[at - first] } } } }]);
  const found = await sequence.controlledEvaluate(items);
  return wanted.map((tokens, row) => tokens.map((token) => found[first + row].next.logits.get(token) ?? null));
}

async function answer(llama, Template, request) {
  const model = await llama.loadModel({ modelPath: request.model, useMmap: true, vocabOnly: request.cases.length === 0 });
  const kept = model.fileInfo.metadata.tokenizer;
  const bos = kept.ggml.tokens?.[kept.ggml.bos_token_id] ?? request.bos;
  const eos = kept.ggml.tokens?.[kept.ggml.eos_token_id] ?? request.eos;
  const tokens = request.texts.map((text) => model.tokenize(text, true));
  const answers = [];
  for (const one of request.cases) {
    let text = null;
    if (one.messages !== null && kept.chat_template !== undefined) {
      text = new Template(kept.chat_template).render({
        messages: one.messages, add_generation_prompt: true, bos_token: bos, eos_token: eos,
      });
    }
    const size = one.ids.length + one.most + 8;
    const context = await model.createContext({
      contextSize: size, batchSize: size, flashAttention: false,
      experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    });
    const sequence = context.getSequence();
    answers.push({
      ids: model.tokenize(one.text, true),
      text,
      logits: await logits(sequence, one.ids, one.reply, one.wanted),
      reply: await greedy(sequence, one.ids, one.most),
    });
    await context.dispose();
  }
  await model.dispose();
  return { tokens, answers };
}

async function main() {
  const [, , modules, requestFile, answerFile] = process.argv;
  const { getLlama } = await load(path.join(modules, "node-llama-cpp"));
  const { Template } = await load(path.join(modules, "@huggingface", "jinja"));
  const { threads, requests } = JSON.parse(fs.readFileSync(requestFile, "utf8"));
  const llama = await getLlama({ build: "never", gpu: false, logLevel: "error", maxThreads: threads });
  const answers = [];
  for (const request of requests) answers.push(await answer(llama, Template, request));
  fs.writeFileSync(answerFile, JSON.stringify(answers));
  process.exit(0);
}

main().catch((error) => {
  console.error(String(error?.stack ?? error));
  process.exit(1);
});
