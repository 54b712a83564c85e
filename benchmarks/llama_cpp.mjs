// What llama.cpp computes of a base model and a LoRA adapter: node llama_cpp.mjs FOLDER < asked
// FOLDER holds node_modules/node-llama-cpp.  Asked is JSON: {base, adapter, texts, prompts, steps}.
// Answers in JSON: token ids of each text, and of each prompt (token ids) the greedy continuation,
// and the log-probability of every token of the vocabulary after each of its tokens.
import path from "node:path";
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [folder] = process.argv.slice(2);
const package_ = path.resolve(folder, "node_modules/node-llama-cpp/dist/index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(package_).href);
const {base, adapter, texts, prompts, steps} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.warn});
const model = await llama.loadModel({modelPath: base, useMmap: false});
const longest = Math.max(...prompts.map((prompt) => prompt.length)) + steps + 8;
const context = await model.createContext({
    contextSize: longest, threads: 1,
    ...(adapter ? {lora: {adapters: [{filePath: adapter, scale: 1}]}} : {}),
});
const tokens = texts.map((text) => model.tokenize(text, false).map(Number));
const answers = [];
for (const prompt of prompts) {
    const sequence = context.getSequence();
    const greedy = [], logs = [];
    const asked = {generateNext: {token: true, probabilities: true, options: {temperature: 0}}};
    const note = ({next}) => {
        const row = new Array(next.probabilities.size);
        for (const [token, probability] of next.probabilities) {
            row[token] = Math.round(1e6 * Math.log(probability)) / 1e6;
        }
        logs.push(row);
        return next.token;
    };
    let next = null;
    for (const found of await sequence.controlledEvaluate(prompt.map((id) => [id, asked]))) {
        next = note(found);
    }
    for (let i = 0; i < steps; i++) {
        greedy.push(Number(next));
        const [found] = await sequence.controlledEvaluate([[next, asked]]);
        next = note(found);
    }
    answers.push({greedy, logs});
    sequence.dispose();
}
process.stdout.write(JSON.stringify({tokens, answers}));
await llama.dispose();
