// Which lines of ../surface.txt a run really calls: the published classes are wrapped, and a line is covered by a test that passed and in
// which a call of it returned. `test` is node's, `cli` starts the command line of the same package. Results go to $SURFACE_RESULTS.
import { execFileSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { test as nodeTest } from "node:test";
import { fileURLToPath } from "node:url";

import { Client, CodeContext, Sandbox, SnapshotsAPI, VolumesAPI } from "@pandastack/sdk";

export const CLI = fileURLToPath(new URL("./node_modules/@pandastack/sdk/dist/cli.js", import.meta.url));

let now = new Set();
const covered = new Map();
const passed = new Set();

const noted = (line, answer) => {
  if (typeof answer?.then === "function") return answer.then((value) => (now.add(line), value));
  if (typeof answer?.next === "function") return reads(line, answer);
  now.add(line);
  return answer;
};

async function* reads(line, items) {
  for await (const item of items) {
    now.add(line);
    yield item;
  }
  now.add(line);
}

function wrap(owner, path) {
  for (const key of Reflect.ownKeys(owner)) {
    const { value } = Object.getOwnPropertyDescriptor(owner, key);
    if (typeof value !== "function" || ["constructor", "prototype"].includes(key) || String(key).startsWith("_")) continue;
    const line = `ts:${path}.${key === Symbol.asyncDispose ? "[Symbol.asyncDispose]" : String(key)}`;
    owner[key] = function (...args) {
      return noted(line, value.apply(this, args));
    };
  }
}

const sample = new Client({ apiKey: "pds_" + "0".repeat(32), apiUrl: "http://127.0.0.1:9" });
const box = Sandbox.fromInfo({ id: "x" }, sample);
const shared = (one) => Object.getPrototypeOf(one);
for (const [owner, path] of [
  [Client.prototype, "Client"], [Sandbox, "Sandbox"], [Sandbox.prototype, "Sandbox"], [CodeContext.prototype, "CodeContext"],
  [VolumesAPI.prototype, "Client.volumes"], [SnapshotsAPI.prototype, "Client.snapshots"], [shared(sample.sandboxes), "Client.sandboxes"],
  [shared(sample.templates), "Client.templates"], [shared(sample.tokens), "Client.tokens"], [shared(box.filesystem), "Sandbox.filesystem"],
  [shared(box.commands), "Sandbox.commands"],
]) wrap(owner, path);

export function test(name, ...rest) {
  const body = rest.pop();
  return nodeTest(name, ...rest, async (context) => {
    now = new Set();
    await body(context);
    const title = `${basename(process.argv[1])}: ${name}`;
    passed.add(title);
    // A client that answered was constructed.
    if (now.has("ts:Client.request")) now.add("ts:Client.constructor");
    for (const line of now) covered.set(line, [...(covered.get(line) ?? []), title]);
  });
}

export function note(line) {
  now.add(line);
}

export function cli(...args) {
  const told = execFileSync(process.execPath, [CLI, ...args], { encoding: "utf8", timeout: 60000 });
  note(`cli:${args.slice(0, 2).join(" ")}`);
  return told;
}

process.on("exit", (code) => {
  if (!process.env.SURFACE_RESULTS) return;
  const told = { complete: code === 0, passed: [...passed].sort(), lines: Object.fromEntries([...covered].sort()) };
  writeFileSync(join(process.env.SURFACE_RESULTS, `${basename(process.argv[1])}.json`), JSON.stringify(told, null, 1));
});
