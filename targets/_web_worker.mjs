// Run a graph in onnxruntime-web (wasm): `node _web_worker.mjs NODE_MODULES`.
//
// It reads requests on stdin and answers on stdout: a line of JSON each, behind which stand the
// bytes that it announces.
import { createRequire } from "node:module";
import { readdirSync, readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { createInterface } from "node:readline";

const out = process.stdout.write.bind(process.stdout);
console.log = console.info = console.error; // stdout is for replies alone
const PIECE = 256; // tokens of a prompt that run at once

const ort = createRequire(join(process.argv[2], "anything.js"))("onnxruntime-web");
let session, caches, length, vocabulary;

async function open({ path, threads }) {
  ort.env.wasm.numThreads = threads;
  const place = dirname(path), graph = basename(path);
  const data = readdirSync(place).filter((name) => name.startsWith(`${graph}_data`));
  session = await ort.InferenceSession.create(readFileSync(path), {
    executionProviders: ["wasm"],
    externalData: data.map((name) => ({ path: name, data: join(place, name) })),
  });
  vocabulary = session.outputMetadata.find(({ name }) => name === "logits").shape.at(-1);
  return { vocabulary, version: ort.env.versions.web };
}

function begin() {
  caches = {};
  length = 0;
  for (const { name, type, shape } of session.inputMetadata)
    if (name.startsWith("past_key_values."))
      caches[name] = new ort.Tensor(type, [], [1, shape[1], 0, shape[3]]); // float32 or int8
}

// Run tokens behind those in the caches; return all their logits.
async function extend(ids) {
  length += ids.length;
  const found = await session.run({
    input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]),
    ...caches,
  });
  for (const name of Object.keys(caches)) caches[name] = found[name.replace("past_key_values", "present")];
  return found.logits.data;
}

async function answer({ do: what, ids, with: how }) {
  if (what === "open") return [await open(how)];
  if (what !== "step") begin();
  if (what === "logits") return [{}, await extend(ids)];
  let logits;
  for (let first = 0; first < ids.length; first += PIECE) logits = await extend(ids.slice(first, first + PIECE));
  return [{}, logits.slice(-vocabulary)];
}

for await (const line of createInterface({ input: process.stdin })) {
  let reply = {}, data = new Float32Array(0);
  try {
    [reply, data = data] = await answer(JSON.parse(line));
  } catch (error) {
    reply = { error: String(error.message ?? error).split("\n")[0] };
  }
  out(`${JSON.stringify({ ...reply, bytes: data.byteLength })}\n`);
  out(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
}
