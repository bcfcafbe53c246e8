//! The suite against the booted appliance: real systemd, real Firecracker, real nested KVM.
//!
//! One appliance serves all tests, in the order of the list below, because a boot under emulation takes most of a minute.
//! Tests leave behind what they found. The last ones cut its power, and the very last leaves it off.

mod abuse;
mod clients;
mod egress;
mod exactness;
mod faults;
mod faults_builds;
mod faults_state;
mod firmware;
mod fixture;
mod model;
mod operator;
mod power;
mod power_state;
mod pressure;
mod replay;
mod sandboxes;
mod world;

use std::{process::ExitCode, sync::Arc};

use fixture::Fixture;
use libtest_mimic::{Arguments, Failed, Trial};

type Test = (&'static str, fn(&Fixture) -> anyhow::Result<()>);

const TESTS: &[Test] = &[
    ("the_disk_is_as_promised", operator::the_disk_is_as_promised),
    ("every_unit_is_up", operator::every_unit_is_up),
    ("guests_stay_on_the_processors_named_for_them", operator::guests_stay_on_the_processors_named_for_them),
    ("nobody_can_log_in", operator::nobody_can_log_in),
    ("exposure_is_within_budget", operator::exposure_is_within_budget),
    ("the_first_token_is_not_in_the_journal", operator::the_first_token_is_not_in_the_journal),
    ("an_early_create_is_refused_in_the_contracts_form_or_served", sandboxes::an_early_create),
    ("templates_are_baked", sandboxes::templates_are_baked),
    ("busctl_administers_tenancy", operator::busctl_administers_tenancy),
    ("busctl_sets_what_a_workspace_may_have", operator::busctl_sets_what_a_workspace_may_have),
    ("systemctl_and_journalctl_show_a_sandbox", operator::systemctl_and_journalctl_show_a_sandbox),
    ("two_instances_have_different_users", operator::two_instances_have_different_users),
    ("vmm_may_manage_nothing_but_sandboxes", operator::vmm_may_manage_nothing_but_sandboxes),
    ("edge_reaches_ports_and_nothing_else", operator::edge_reaches_ports_and_nothing_else),
    ("python_client", clients::python),
    ("typescript_client", clients::typescript),
    ("the_compatibility_document_is_that_of_the_run", clients::compatibility),
    ("an_idle_persistent_sandbox_sleeps_until_it_is_used", sandboxes::an_idle_persistent_sandbox),
    ("a_guest_reaches_the_internet_and_nothing_else", egress::a_guest_reaches_the_internet_and_nothing_else),
    ("a_guest_that_fills_its_disk_harms_nobody", abuse::a_full_disk),
    ("a_guest_that_forks_without_end_harms_nobody", abuse::a_fork_bomb),
    ("a_guest_that_floods_its_console_harms_nobody", abuse::a_console_flood),
    ("garbage_on_vsock_harms_nobody", abuse::garbage_on_vsock),
    ("a_dead_firecracker_is_told_as_failed", sandboxes::a_dead_firecracker),
    ("an_index_that_is_gone_is_rebuilt", faults::an_index_that_is_gone_is_rebuilt),
    ("killed_daemons_lose_and_leak_nothing", faults::killed_daemons_lose_and_leak_nothing),
];

/// The power goes off, and is cut.
const LAST: &[Test] = &[
    ("a_clean_shutdown_and_boot_keep_the_truth", power::a_clean_shutdown_and_boot_keep_the_truth),
    ("power_cuts_lose_nothing_acknowledged", power::power_cuts_lose_nothing_acknowledged),
    ("cuts_at_flush_boundaries_lose_nothing_acknowledged", replay::cuts_at_flush_boundaries),
];

/// Those that take long, or whose guests have much to do: `SUITE=long` runs them before the power is touched.
const LONG: &[Test] = &[
    ("every_copy_agrees_with_itself", exactness::every_copy_agrees),
    ("a_fork_makes_its_parent_wait_no_longer_than_its_pause", exactness::a_parent_waits_for_its_pause_only),
    ("random_state_changes_are_those_of_the_model", model::random_state_changes),
    ("a_burst_of_creates_fails_none", pressure::a_burst_of_creates),
    ("forks_beyond_memory_are_refused_or_whole", pressure::forks_beyond_memory),
    ("a_full_data_partition_refuses_and_keeps_what_it_has", pressure::a_full_data_partition),
    ("state_changes_whose_process_is_killed_are_whole_or_not_there", faults_state::killed_in_the_middle),
    ("builds_whose_api_is_killed_are_done", faults_builds::killed_in_each_stage),
    ("builds_whose_power_is_cut_are_done", faults_builds::cut_in_each_stage),
    (
        "a_flashed_disk_boots_and_shows_its_first_token_once",
        firmware::a_flashed_disk_boots_and_shows_its_first_token_once,
    ),
];

fn is_long() -> bool {
    std::env::var_os("SUITE").is_some_and(|suite| suite == "long")
}

fn tests() -> Vec<&'static Test> {
    TESTS.iter().chain(LONG.iter().filter(|_| is_long())).chain(LAST).collect()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share one machine.
    arguments.test_threads = Some(1);
    if arguments.list {
        let trials = tests().into_iter().map(|(name, _)| Trial::test(*name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, trials).exit_code();
    }
    let fixture = match Fixture::boot() {
        Ok(fixture) => Arc::new(fixture),
        Err(error) => {
            eprintln!("the appliance does not come up: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let trials = tests()
        .into_iter()
        .map(|(name, test)| {
            let fixture = Arc::clone(&fixture);
            Trial::test(*name, move || {
                let started = std::time::Instant::now();
                let outcome = test(&fixture);
                eprintln!("  {name}: {:.0} s", started.elapsed().as_secs_f64());
                outcome.map_err(|error| {
                    fixture.explain(name);
                    // What it left behind would fail the next one for it.
                    let _ = fixture.api().and_then(|api| api.delete_all());
                    Failed::from(format!("{error:#}"))
                })
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    println!("{} passed, {} failed", conclusion.num_passed, conclusion.num_failed);
    conclusion.exit_code()
}
