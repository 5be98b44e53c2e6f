// A chat with a folder of `moe2edge export -t onnx:layout=web`, by transformers.js, in one module.
//
// Query of the page: model (address of the folder; model/), device (wasm, webgpu), tokens (of an
// answer at most), prompt (sent at once).
import { AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, TextStreamer, env } from "@huggingface/transformers";

const query = new URLSearchParams(location.search);
const folder = new URL(query.get("model") ?? "model/", location);
const find = (id) => document.getElementById(id);

// Types that transformers.js does not know. All that differs between them is in the graph.
const UNKNOWN_TYPES = ["mixtral", "olmoe"], SIMILAR_TYPE = "qwen3_moe";

// Everything comes from the server of this page; transformers.js asks a CDN otherwise.
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL("..", folder).pathname;
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = import.meta.resolve("onnxruntime-web/");
const name = folder.pathname.split("/").at(-2);

async function open() {
  const config = await (await fetch(new URL("config.json", folder))).json();
  const type = config.model_type;
  if (UNKNOWN_TYPES.includes(type)) config.model_type = SIMILAR_TYPE;
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const begun = performance.now();
  const model = await AutoModelForCausalLM.from_pretrained(name, {
    config, device: query.get("device") ?? "wasm",
    progress_callback: ({ status, file, progress }) => {
      if (status === "progress") find("status").textContent = `loading ${file}: ${Math.round(progress)} %`;
    },
  });
  const seconds = (performance.now() - begun) / 1000;
  const threads = self.crossOriginIsolated ? env.backends.onnx.wasm.numThreads ?? "several" : 1;
  find("status").textContent = `${type}, ${config.num_hidden_layers} blocks, loaded in ${seconds.toFixed(1)} s; `
    + `${query.get("device") ?? "wasm"}, ${threads} thread${threads === 1 ? "" : "s"}`;
  return { tokenizer, model };
}

const turns = [], stop = new InterruptableStoppingCriteria();
let opened, running = false;

function show(role, text) {
  const line = document.createElement("p");
  line.className = role;
  line.textContent = text;
  find("turns").append(line);
  return line;
}

async function answer(text) {
  const { tokenizer, model } = opened;
  turns.push({ role: "user", content: text });
  show("user", text);
  const line = show("model", "");
  // A model without a chat template continues the text.
  const inputs = tokenizer.chat_template
    ? tokenizer.apply_chat_template(turns, { add_generation_prompt: true, return_dict: true })
    : tokenizer(text);
  let count = 0, first;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true, skip_special_tokens: true,
    callback_function: (piece) => { line.textContent += piece; },
    token_callback_function: () => {
      if (count++ === 0) first = performance.now();
      else find("speed").textContent = `${count} tokens, ${speed(count, first)} tokens/s`;
    },
  });
  stop.reset();
  await model.generate({
    ...inputs, max_new_tokens: Number(query.get("tokens") ?? 128), streamer, stopping_criteria: stop,
  });
  turns.push({ role: "assistant", content: line.textContent });
  console.info(`answered: ${JSON.stringify({ text: line.textContent, tokens: count, speed: speed(count, first) })}`);
}

// Tokens per second behind the first, which waits for the prompt.
const speed = (count, first) => Number(((count - 1) / ((performance.now() - first) / 1000)).toFixed(1));

async function send(text) {
  running = true;
  find("send").textContent = "Stop";
  try {
    await answer(text);
  } finally {
    running = false;
    find("send").textContent = "Send";
  }
}

function fail(error) {
  find("status").textContent = `failed: ${error.message ?? error}`;
  console.info(`failed: ${error.message ?? error}`);
}

document.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return stop.interrupt();
  const text = find("prompt").value;
  find("prompt").value = "";
  if (text.trim()) send(text).catch(fail);
});

try {
  opened = await open();
  find("prompt").disabled = find("send").disabled = false;
  console.info(`opened: ${find("status").textContent}`);
  if (query.has("prompt")) await send(query.get("prompt"));
} catch (error) {
  fail(error);
}
