// Snapshots, forks, hibernation and volumes through the published TypeScript client, unmodified.
import assert from "node:assert/strict";
import { after, before } from "node:test";

import { BadRequestError, Client, ExploreError, NotFoundError, Sandbox } from "@pandastack/sdk";

import { cli, test } from "./surface.mjs";

const client = new Client();
const made = new Set();
const keep = (sandbox) => (made.add(sandbox), sandbox);
const status = async (one) => (await Sandbox.get(one.id, client)).status;
let sandbox;

before(async () => {
  sandbox = keep(await Sandbox.create({ template: "base", metadata: { suite: "ts-state" } }, client));
  await sandbox.filesystem.write("/root/kept", "then");
  await sandbox.exec("echo then > /dev/shm/kept");
});
after(async () => {
  for (const one of made) await one.kill().catch(() => {});
});

const memoryAndDisk = async (one) => (await one.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/kept; echo; cat /dev/shm/kept")).stdout;

test("pause and resume", async () => {
  await sandbox.pause();
  assert.equal(await status(sandbox), "paused");
  await assert.rejects(sandbox.exec("true"), BadRequestError);
  await sandbox.resume();
  assert.equal((await sandbox.exec("echo on")).stdout, "on\n");
});

test("hibernate, wake, and waking by use", async () => {
  await sandbox.hibernate();
  assert.equal(await status(sandbox), "hibernated");
  await sandbox.wake();
  await sandbox.wake();
  assert.equal(await status(sandbox), "running");
  await sandbox.hibernate();
  assert.equal(await memoryAndDisk(sandbox), "then\nthen\n");
});

test("snapshots", async () => {
  const taken = await sandbox.snapshot();
  assert.ok(taken.id && taken.created_at);
  assert.equal(taken.sandbox_id, sandbox.id);
  await sandbox.exec("echo later > /root/kept; echo later > /dev/shm/kept");
  // The client sends its default template with it.
  const copy = keep(await Sandbox.create({ from_snapshot: taken.id }, client));
  const other = keep(await Sandbox.create({ template: "base", fromSnapshot: taken.id }, client));
  assert.equal(copy.template, "base");
  assert.equal(await memoryAndDisk(copy), "then\nthen\n");
  assert.equal(await memoryAndDisk(other), "then\nthen\n");
  assert.equal((await sandbox.exec("cat /root/kept")).stdout, "later\n");
  await sandbox.exec("printf then > /root/kept; echo then > /dev/shm/kept");

  assert.equal((await client.snapshots.get(taken.id)).template, "base");
  assert.ok((await client.snapshots.list()).some((one) => one.id === taken.id));
  assert.deepEqual((await client.snapshots.list({ sandbox_id: sandbox.id })).map((one) => one.id), [taken.id]);
  await client.snapshots.delete(taken.id);
  await assert.rejects(client.snapshots.get(taken.id), NotFoundError);
  assert.equal(await memoryAndDisk(copy), "then\nthen\n");
  await copy.kill();
  await other.kill();
});

test("fork, forkTree and promote", async () => {
  const child = keep(await sandbox.fork({ metadata: { a: "b" } }));
  assert.equal(child.status, "running");
  assert.equal(await memoryAndDisk(child), "then\nthen\n");
  await child.kill();

  const tree = await sandbox.forkTree({ count: 3, metadata: { a: "b" } });
  tree.forEach(keep);
  assert.equal(new Set(tree.map((one) => one.id)).size, 3);
  for (const one of tree) assert.equal(await memoryAndDisk(one), "then\nthen\n");
  const told = await tree[1].promote({ cleanupSiblings: true });
  assert.equal(told.winner, tree[1].id);
  assert.deepEqual([...told.deleted].sort(), [tree[0].id, tree[2].id].sort());
  await assert.rejects(Sandbox.get(tree[0].id, client), NotFoundError);
  assert.equal(await status(tree[1]), "running");
  await tree[1].kill();
  await assert.rejects(sandbox.forkTree({ count: 17 }), BadRequestError);
});

test("explore keeps the best branch", async () => {
  const result = await sandbox.explore(["echo 3 > /root/score", "echo 8 > /root/score", "exit 1"], {
    scoreFn: async (one, outcome) => (outcome.ok ? Number(await one.filesystem.read("/root/score")) : 0),
  });
  keep(result.winner);
  assert.deepEqual(result.errors, []);
  assert.deepEqual(result.outcomes.map((outcome) => outcome.score), [8, 3, 0]);
  assert.equal(await result.winner.filesystem.read("/root/score"), "8\n");
  assert.equal(result.reaped.length, 2);
  await result.winner.kill();
  await assert.rejects(sandbox.explore(["exit 1", "exit 2"]), ExploreError);
  const left = (await Sandbox.list(client)).filter((one) => one.status === "running").map((one) => one.id);
  assert.ok(left.includes(sandbox.id));
});

test("volumes", async () => {
  const name = "ts-volume";
  const volume = await client.volumes.create({ name, size_mb: 64 });
  assert.deepEqual([volume.name, volume.size_mb], [name, 64]);
  assert.ok((await client.volumes.list()).some((one) => one.name === name));
  const writer = keep(await Sandbox.create({ template: "base", volumes: [{ name }] }, client));
  assert.equal((await writer.exec(`echo kept > /mnt/${name}/f && sync && cat /mnt/${name}/f`)).stdout, "kept\n");
  await assert.rejects(client.volumes.delete(name), BadRequestError);
  await assert.rejects(Sandbox.create({ template: "base", volumes: [{ name }] }, client), BadRequestError);
  await writer.kill();
  const reader = keep(await Sandbox.create({ template: "base", volumes: [{ name, readOnly: true }] }, client));
  assert.equal((await reader.exec(`touch /mnt/${name}/g || cat /mnt/${name}/f`)).stdout, "kept\n");
  await reader.kill();
  assert.equal((await client.volumes.get(name)).name, name);
  await client.volumes.delete(name);
  await assert.rejects(client.volumes.get(name), NotFoundError);
});

test("the command line of the same package", async () => {
  const run = (...args) => cli("sandbox", ...args);
  for (const verb of ["pause", "resume", "hibernate", "wake"]) assert.match(run(verb, sandbox.id), new RegExp(sandbox.id));
  const snapshot = JSON.parse(run("snapshot", sandbox.id));
  await client.snapshots.delete(snapshot.id);
  const children = JSON.parse(run("fork-tree", sandbox.id, "--count", "2"));
  assert.match(run("promote", children[0].id), new RegExp(children[0].id));
  for (const child of [...children, JSON.parse(run("fork", sandbox.id))]) run("delete", child.id);
  assert.equal(await status(sandbox), "running");
});
