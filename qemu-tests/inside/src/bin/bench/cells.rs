//! Cells of a code interpreter session through the API, beside the same cells by the kernel's own protocol in the guest.

use anyhow::{Context, Result};
use serde_json::json;

use crate::{Table, tools::Api};

/// What has sessions.
pub const TEMPLATE: &str = "code-interpreter";
/// Cells of each kind in a round, so that an exec that starts a batch in the guest is not what is measured.
const CELLS: usize = 5;

/// A kernel of its own in the guest, as the one of a session, spoken to without anything of ours; `count` cells for each line in
/// the first pipe, their microseconds into the second.
const BARE: &str = r#"mkdir -p /run/bench; cd /run/bench; mkfifo in out; cat > bare.py <<'END'
import time
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
specs = KernelSpecManager(kernel_dirs=["/usr/lib/pandastack/kernels/specs"], ensure_native_kernel=False)
manager = KernelManager(kernel_name="python", kernel_spec_manager=specs, transport="ipc", ip="/run/bench/kernel")
manager.start_kernel()
client = manager.client()
client.start_channels(stdin=False, hb=False)
client.wait_for_ready(timeout=300)
def cell():
    start = time.perf_counter()
    request = client.execute("6 * 7", allow_stdin=False)
    while client.get_shell_msg(timeout=60)["parent_header"].get("msg_id") != request:
        pass
    while True:
        said = client.get_iopub_msg(timeout=60)
        mine = said["parent_header"].get("msg_id") == request
        if mine and said["header"]["msg_type"] == "status" and said["content"]["execution_state"] == "idle":
            return (time.perf_counter() - start) * 1e6
while True:
    with open("/run/bench/in") as asked:
        count = int(asked.read())
    with open("/run/bench/out", "w") as told:
        told.write(" ".join(str(cell()) for _ in range(count)))
END
setsid python3 bare.py > log 2>&1 < /dev/null & true"#;

/// `kernel_round_trip`, `repl_cell_over_kernel`.
pub async fn measure(api: &mut Api, rounds: usize, table: &mut Table) -> Result<()> {
    let (id, _, _) = api.create(TEMPLATE).await?;
    api.exec(&id, BARE).await?;
    let (opened, _) = api.verb(&id, "repl/sessions", Some(&json!({"language": "python"}))).await?;
    let session = opened["session_id"].as_str().context("no session")?.to_owned();
    let run = format!("repl/sessions/{session}/run");
    let cell = json!({"code": "6 * 7"});
    let (mut bare, mut cells) = (vec![], vec![]);
    for round in 0..=rounds {
        let batch = json!({"cmd": format!("echo {CELLS} > /run/bench/in; cat /run/bench/out"), "timeout_seconds": 300});
        let (told, _) = api.verb(&id, "exec", Some(&batch)).await?;
        let series = told["stdout"].as_str().context("no output")?;
        let series: Vec<f64> = series.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        for _ in 0..CELLS {
            let (answer, micros) = api.verb(&id, &run, Some(&cell)).await?;
            anyhow::ensure!(answer["results"][0]["text/plain"] == "42", "the cell answered {answer}");
            // The first round has what is done once.
            if round > 0 {
                cells.push(micros);
            }
        }
        if round > 0 {
            bare.extend(series);
        }
    }
    api.delete(&id).await?;

    table.put("kernel_round_trip", "us", bare, None);
    table.put("repl_cell_over_kernel", "us", cells, Some("kernel_round_trip"));
    Ok(())
}
