// What llama.cpp computes of a base model and a LoRA adapter: node llama_cpp.mjs FOLDER < asked
//
// FOLDER holds node_modules/node-llama-cpp.  Asked is JSON: {base, adapter, texts, prompts, steps,
// logs}, prompts as token ids.  Answers in JSON: the token ids of each text, and the greedy
// continuation of each prompt by `steps` tokens.  The file `logs` gets, as float32 and prompt after
// prompt, the log-probability of every token after each token of prompt and continuation.
import {closeSync, openSync, readFileSync, writeSync} from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const index = path.resolve(process.argv[2], "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(index).href);
const {base, adapter, texts, prompts, steps, logs} = JSON.parse(readFileSync(0, "utf8"));

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: base});
const longest = Math.max(...prompts.map((prompt) => prompt.length)) + steps;
const context = await model.createContext({
    contextSize: longest + 8, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    ...(adapter ? {lora: {adapters: [{filePath: adapter, scale: 1}]}} : {})
});
const greedy = {
    generateNext: {token: true, probabilities: true, options: {temperature: 0}}
};
const file = openSync(logs, "w");

function note({next}) {
    const row = new Float32Array(next.probabilities.size);
    for (const [token, probability] of next.probabilities) row[token] = Math.log(probability);
    writeSync(file, row);
    return next.token;
}

const answers = [], sequence = context.getSequence();
for (const prompt of prompts) {
    await sequence.clearHistory();
    const found = await sequence.controlledEvaluate(prompt.map((token) => [token, greedy]));
    const chosen = [found.map(note).at(-1)];
    for (let step = 0; step < steps; step++) {
        const [result] = await sequence.controlledEvaluate([[chosen.at(-1), greedy]]);
        chosen.push(note(result));
    }
    answers.push(chosen.slice(0, steps));
}
closeSync(file);
const tokens = texts.map((text) => [...model.tokenize(text, true)]);
process.stdout.write(JSON.stringify({tokens, greedy: answers}));
await llama.dispose();
