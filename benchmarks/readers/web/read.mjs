// Greedy text of folders by three programs: `node read.mjs node|wasm|transformers FOLDER TOKENS IDS`.
// Prints the version, the ids and the milliseconds of the fastest token behind the first, as JSON.
import { readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const [program, folder, count, prompt] = process.argv.slice(2);
const ids = JSON.parse(prompt), place = join(folder, "onnx"), packages = process.env.MOE2EDGE_NODE_MODULES;
const require = createRequire(join(packages, "anything.js"));
let begun, times = [];
const tick = () => { const now = performance.now(); if (begun) times.push(now - begun); begun = now; };

async function runGraph(ort, session) {
  const past = {}, all = [...ids];
  for (const { name, type, shape } of session.inputMetadata)
    if (name.startsWith("past")) past[name] = new ort.Tensor(type, [], [1, shape[1], 0, shape[3]]);
  for (let now = ids; all.length < ids.length + Number(count); tick()) {
    const found = await session.run({
      input_ids: new ort.Tensor("int64", BigInt64Array.from(now, BigInt), [1, now.length]),
      attention_mask: new ort.Tensor("int64", new BigInt64Array(all.length).fill(1n), [1, all.length]),
      ...past,
    });
    const last = found.logits.data.slice(-found.logits.dims[2]);
    now = [last.reduce((best, value, n) => (value > last[best] ? n : best), 0)];
    all.push(now[0]);
    for (const name of Object.keys(past)) past[name] = found[name.replace("past_key_values", "present")];
  }
  return all.slice(ids.length);
}

async function runTransformers() {
  const module = join(packages, "@huggingface/transformers/dist/transformers.node.mjs");
  const { env, AutoConfig, AutoModelForCausalLM, Tensor, BaseStreamer } = await import(pathToFileURL(module));
  env.localModelPath = dirname(folder) + "/";
  env.allowRemoteModels = false;
  const name = basename(folder), config = await AutoConfig.from_pretrained(name);
  const type = ["mixtral", "olmoe"].includes(config.model_type) ? "qwen3_moe" : config.model_type;
  const model = await AutoModelForCausalLM.from_pretrained(name, { config: { ...config, model_type: type } });
  class Ticks extends BaseStreamer { put() { tick(); } end() {} }
  const mask = new BigInt64Array(ids.length).fill(1n);
  const found = await model.generate({
    input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new Tensor("int64", mask, [1, ids.length]),
    max_new_tokens: Number(count), eos_token_id: 999999, do_sample: false, streamer: new Ticks(),
  });
  times.shift(); // the prompt's tokens are put first
  return found.tolist()[0].map(Number).slice(ids.length);
}

const read = (name) => JSON.parse(readFileSync(join(packages, name, "package.json"))).version;
let found, version;
if (program === "transformers") {
  version = `transformers.js ${read("@huggingface/transformers")}`;
  found = await runTransformers();
} else {
  const name = program === "node" ? "onnxruntime-node" : "onnxruntime-web", ort = require(name);
  version = `${name} ${read(name)}`;
  let session;
  if (program === "node") session = await ort.InferenceSession.create(join(place, "model.onnx"), { intraOpNumThreads: 1 });
  else {
    ort.env.wasm.numThreads = 1;
    const data = readdirSync(place).filter((file) => file.startsWith("model.onnx_data"));
    session = await ort.InferenceSession.create(readFileSync(join(place, "model.onnx")), {
      executionProviders: ["wasm"], externalData: data.map((path) => ({ path, data: join(place, path) })),
    });
  }
  found = await runGraph(ort, session);
}
times.sort((a, b) => a - b);
console.log(JSON.stringify({ version, ids: found, ms: times[0] }));
process.exit(0);
