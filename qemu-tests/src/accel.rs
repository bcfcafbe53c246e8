//! Which accelerator QEMU gets. The appliance runs KVM guests of its own, so what counts is whether nesting works,
//! not whether `/dev/kvm` opens: a paravirtual KVM answers there, too, and a stock kernel crawls on it.

use std::fs;
use std::path::Path;

/// How QEMU executes the appliance's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware virtualization with nesting.
    Kvm,
    /// QEMU's software emulation, with an emulated AMD SVM. Real, and about ten times slower.
    Tcg,
}

/// A choice and the sentence that explains it to whoever waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What to use.
    pub accelerator: Accelerator,
    /// Why, as one clause.
    pub because: String,
}

/// What the machine says about itself; see [`probe`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The `flags` line of the first processor in `/proc/cpuinfo`.
    pub flags: String,
    /// The `nested` parameter of the loaded KVM module, if one is loaded.
    pub nested: Option<String>,
    /// Whether `/dev/kvm` opens for reading and writing.
    pub device: bool,
}

/// Decides from facts alone.
#[must_use]
pub fn choose(facts: &Facts) -> Choice {
    let tcg = |because: &str| Choice { accelerator: Accelerator::Tcg, because: because.to_owned() };
    let flag = facts.flags.split_whitespace().find(|flag| matches!(*flag, "svm" | "vmx"));
    let nested = facts.nested.as_deref().map(str::trim);
    match (flag, nested, facts.device) {
        (None, _, true) => tcg("/dev/kvm exists, but the processor shows neither svm nor vmx"),
        (None, _, false) => tcg("the processor shows neither svm nor vmx"),
        (Some(flag), None, _) => tcg(&format!("the processor has {flag}, but no KVM module is loaded")),
        (Some(_), Some(nested), _) if !matches!(nested, "1" | "Y" | "y") => {
            tcg("nesting is off (the KVM module's parameter `nested`)")
        }
        (Some(_), Some(_), false) => tcg("/dev/kvm cannot be opened"),
        (Some(flag), Some(_), true) => Choice {
            accelerator: Accelerator::Kvm,
            because: format!("the processor has {flag} and nesting is on"),
        },
    }
}

/// Reads this machine's facts.
#[must_use]
pub fn probe() -> Facts {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let nested = ["kvm_amd", "kvm_intel"].iter().find_map(|module| {
        fs::read_to_string(Path::new("/sys/module").join(module).join("parameters/nested")).ok()
    });
    Facts {
        flags: flags.to_owned(),
        nested,
        device: fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok(),
    }
}

impl Accelerator {
    /// The part of QEMU's command line that depends on the accelerator.
    #[must_use]
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // A thread per processor. With one thread for all, nested guests of two processors were seen to hang at boot.
            // See `kernel_arguments` for what a second thread does to processor 0.
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"],
        }
    }

    /// How many processors it needs, at least, for two of them to be the guests'.
    #[must_use]
    pub fn processors(self) -> u32 {
        match self {
            Self::Kvm => 2,
            Self::Tcg => 3,
        }
    }

    /// Words for the kernel command line, for a machine of `cpus` processors.
    ///
    /// Emulation has no speculation to defend against, and the defences cost a tenth of the boot.
    ///
    /// Emulated guests stay off processor 0. QEMU (read in 10.0.13; 7.2 and 11.1 reset guests alike) clears the IGNNE flag of
    /// its *first* processor whenever *any* processor restores its FPU state: a plain read and write of the word that also
    /// says whether nested paging and global interrupts are on, from another thread. Where processor 0 enters or leaves a
    /// guest at that moment, one of these bits is lost, and the guest, or the whole appliance, is reset or scribbled over.
    /// Processors that run no guests do not change the word.
    #[must_use]
    pub fn kernel_arguments(self, cpus: u32) -> Vec<String> {
        match (self, cpus) {
            (Self::Kvm, _) => Vec::new(),
            (Self::Tcg, ..2) => vec!["mitigations=off".into()],
            (Self::Tcg, _) => {
                vec!["mitigations=off".into(), format!("pandastack.guest_cpus=1-{}", cpus - 1)]
            }
        }
    }

    /// How much longer things take than on hardware; for deadlines.
    #[must_use]
    pub fn patience(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Tcg => 6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(flags: &str, nested: Option<&str>, device: bool) -> Facts {
        Facts { flags: flags.to_owned(), nested: nested.map(str::to_owned), device }
    }

    #[test]
    fn emulated_guests_stay_off_the_first_processor() {
        let words = |cpus| Accelerator::Tcg.kernel_arguments(cpus).join(" ");

        assert!(words(3).contains("pandastack.guest_cpus=1-2"));
        assert!(words(8).contains("pandastack.guest_cpus=1-7"));
        assert!(!words(1).contains("guest_cpus"), "there is no other one");
        assert!(Accelerator::Kvm.kernel_arguments(8).is_empty());
    }

    #[test]
    fn only_working_nesting_gets_kvm() {
        for (facts, expected) in [
            (facts("\t: fpu svm npt", Some("1\n"), true), Accelerator::Kvm),
            (facts("\t: fpu vmx", Some("Y\n"), true), Accelerator::Kvm),
            (facts("\t: fpu vmx", Some("N\n"), true), Accelerator::Tcg),
            (facts("\t: fpu vmx", None, true), Accelerator::Tcg),
            (facts("\t: fpu svm", Some("1"), false), Accelerator::Tcg),
            (facts("\t: fpu", Some("1"), true), Accelerator::Tcg),
            (facts("\t: fpu svm_lock", Some("1"), true), Accelerator::Tcg),
        ] {
            assert_eq!(choose(&facts).accelerator, expected, "{facts:?}");
        }
    }
}
