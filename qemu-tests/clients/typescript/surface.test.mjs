// What the published TypeScript client has beside what the other suites use.
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before } from "node:test";

import { Client, NotFoundError, Sandbox } from "@pandastack/sdk";

import { test } from "./surface.mjs";

const client = new Client();
let sandbox;

before(async () => {
  sandbox = await client.sandboxes.create({ template: "base", metadata: { suite: "ts-surface" } });
});
after(async () => sandbox?.kill());

test("sandboxes by the client", async () => {
  const made = await client.sandboxes.create({ template: "base" });
  assert.equal((await client.sandboxes.get(made.id)).id, made.id);
  assert.ok((await client.sandboxes.list()).some((one) => one.id === made.id));
  await client.sandboxes.delete(made.id);
  await assert.rejects(client.sandboxes.get(made.id), NotFoundError);
});

test("any request, and a sandbox of an answer", async () => {
  const answer = await client.request("GET", `/sandboxes/${sandbox.id}`);
  const same = Sandbox.fromInfo(answer, client);
  assert.equal((await same.exec("echo same")).stdout, "same\n");
});

test("a sandbox is deleted where its block ends", async () => {
  const made = await Sandbox.create({ template: "base" }, client);
  await made[Symbol.asyncDispose]();
  await assert.rejects(Sandbox.get(made.id, client), NotFoundError);
  const other = await Sandbox.create({ template: "base" }, client);
  await other.kill();
  await assert.rejects(Sandbox.get(other.id, client), NotFoundError);
});

test("logs", async () => {
  await sandbox.exec("echo to-out; echo to-err >&2");
  const lines = [];
  for await (const line of sandbox.logs()) lines.push(line);
  assert.ok(lines.some((line) => line.includes("to-out")) && lines.some((line) => line.includes("to-err")));
  for await (const line of sandbox.logs({ stream: "stderr" })) assert.ok(!line.includes("to-out"));
});

test("previews", async () => {
  client.previewHost = process.env.PANDASTACK_PREVIEW_HOST;
  const host = `3000-${sandbox.id}.${client.previewHost}`;
  assert.equal(sandbox.previewUrl(3000), `https://${host}`);
  const listens = "import socket, time; s = socket.create_server(('127.0.0.1', 3000)); time.sleep(100)";
  await sandbox.exec(`setsid python3 -c "${listens}" >/dev/null 2>&1 < /dev/null &`);
  let shown = {};
  for (let turn = 0; turn < 100 && !JSON.stringify(shown).includes(host); turn += 1) {
    await new Promise((resolve) => setTimeout(resolve, 300));
    shown = await sandbox.previewUrls();
  }
  assert.ok(JSON.stringify(shown).includes(host), JSON.stringify(shown));
  await sandbox.exec("pkill -f create_server");
});

test("files by path, commands", async () => {
  const directory = mkdtempSync(join(tmpdir(), "surface-"));
  writeFileSync(join(directory, "here"), "pändä\n".repeat(100));
  await sandbox.filesystem.upload(join(directory, "here"), "/tmp/surface");
  await sandbox.filesystem.download("/tmp/surface", join(directory, "there"));
  assert.deepEqual(readFileSync(join(directory, "there")), readFileSync(join(directory, "here")));
  assert.equal((await sandbox.commands.run("wc -l < /tmp/surface")).stdout.trim(), "100");
});

test("a template of the catalogue", async () => {
  assert.equal((await client.templates.get("base")).name, "base");
  await assert.rejects(client.templates.get("nothing"), NotFoundError);
});

test("builds of an archive and of an image are taken and cancelled", async () => {
  const imageRef = `${process.env.SUITE_REGISTRY}/nobody/has:this`;
  const archive = await client.templates.build({ name: "suite-ts-archive", rootfs: new Blob(["no archive"]), sizeMb: 128 });
  const image = await client.templates.register({ name: "suite-ts-image", imageRef, sizeMb: 128, memoryMb: 512 });
  for (const build of [archive, image]) {
    assert.equal(build.status, "queued");
    await client.request("POST", `/templates/builds/${build.id}/cancel`);
    await assert.rejects(client.templates.waitForBuild(build.id, { timeoutMs: 300_000 }), /cancelled/);
  }
});

test("a code context ends where its block ends", async () => {
  const notebook = await Sandbox.create({ template: "code-interpreter" }, client);
  try {
    const context = await notebook.createCodeContext("python");
    assert.equal((await context.runCode("6 * 7")).text, "42");
    await context[Symbol.asyncDispose]();
    await assert.rejects(context.runCode("1"), NotFoundError);
  } finally {
    await notebook.kill();
  }
});
