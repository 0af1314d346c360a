//! The results of a scenario: one or many cases, some of them reported by a program inside a guest.

use std::fmt;

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As it should.
    Passed,
    /// Otherwise: why.
    Failed(String),
    /// It does not apply here: why.
    Skipped(String),
}

/// A case and how it ended. An empty name stands for the scenario as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) verdict: Verdict,
}

/// The cases of one scenario.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cases(pub(crate) Vec<Case>);

/// The words with which a program inside a guest summarises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Summary {
    passed: usize,
    failed: usize,
}

impl Cases {
    /// The scenario as a whole passed.
    pub(crate) fn passed() -> Self {
        Self(vec![Case { name: String::new(), verdict: Verdict::Passed }])
    }

    /// The scenario as a whole failed.
    pub(crate) fn failed(why: impl fmt::Display) -> Self {
        Self(vec![Case { name: String::new(), verdict: Verdict::Failed(why.to_string()) }])
    }

    /// The scenario as a whole does not apply.
    pub(crate) fn skipped(why: impl fmt::Display) -> Self {
        Self(vec![Case { name: String::new(), verdict: Verdict::Skipped(why.to_string()) }])
    }

    /// The cases that a guest reported: lines `ok NAME`, `FAIL NAME: WHY` and `skip NAME: WHY`, then
    /// `done N passed, N failed`. A log without the last line, with a wrong one or without any case is a failure of its
    /// own: cases that never ran must not go unnoticed.
    pub(crate) fn reported_in(log: &str) -> Self {
        let mut cases = Self::default();
        let mut summary = None;
        for line in log.lines().map(str::trim_end) {
            if let Some(case) = case_in(line) {
                cases.0.push(case);
            } else if let Some(found) = summary_in(line) {
                summary = Some(found);
            }
        }
        let seen =
            Summary { passed: cases.count(|v| *v == Verdict::Passed), failed: cases.count(is_failure) };
        let complaint = match summary {
            None => Some(format!("it never finished; its last case was {}", cases.last_name())),
            Some(said) if said != seen => Some(format!(
                "it says {} passed and {} failed, but its lines say {} and {}",
                said.passed, said.failed, seen.passed, seen.failed
            )),
            Some(_) if cases.0.is_empty() => Some("it ran no case".into()),
            Some(_) => None,
        };
        cases.0.extend(complaint.map(|why| Case { name: String::new(), verdict: Verdict::Failed(why) }));
        cases
    }

    /// Adds a failure of the scenario as a whole if `what` does not hold.
    pub(crate) fn require(&mut self, what: bool, otherwise: impl FnOnce() -> String) {
        if !what {
            self.0.push(Case { name: String::new(), verdict: Verdict::Failed(otherwise()) });
        }
    }

    /// How many verdicts are of a kind.
    pub(crate) fn count(&self, kind: impl Fn(&Verdict) -> bool) -> usize {
        self.0.iter().filter(|case| kind(&case.verdict)).count()
    }

    fn last_name(&self) -> &str {
        self.0.last().map_or("none", |case| &case.name)
    }
}

pub(crate) fn is_failure(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Failed(_))
}

fn case_in(line: &str) -> Option<Case> {
    let (word, rest) = line.split_once(' ')?;
    let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-./:#+=,[]()".contains(c);
    if name.is_empty() || !name.chars().all(is_name) {
        return None;
    }
    let verdict = match word {
        "ok" if why.is_empty() => Verdict::Passed,
        "FAIL" => {
            Verdict::Failed(if why.is_empty() { "the guest does not say why".into() } else { why.into() })
        }
        "skip" => Verdict::Skipped(why.into()),
        _ => return None,
    };
    Some(Case { name: name.into(), verdict })
}

fn summary_in(line: &str) -> Option<Summary> {
    let (passed, failed) = line.strip_prefix("done ")?.strip_suffix(" failed")?.split_once(" passed, ")?;
    Some(Summary { passed: passed.parse().ok()?, failed: failed.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(log: &str) -> Vec<String> {
        let why = |case: Case| match case.verdict {
            Verdict::Failed(why) => Some(format!("{}|{why}", case.name)),
            _ => None,
        };
        Cases::reported_in(log).0.into_iter().filter_map(why).collect()
    }

    #[test]
    fn each_line_is_a_case() {
        let cases = Cases::reported_in(
            "umbra: vm \"a\": started\r\nok cpuid/leaf_0\nFAIL msr: expected 1, got 2\nskip x2apic: not offered\n\
             ok then some words\ndone 1 passed, 1 failed\numbra: end: status 3\n",
        );
        let case = |name: &str, verdict| Case { name: name.into(), verdict };
        assert_eq!(
            cases.0,
            [
                case("cpuid/leaf_0", Verdict::Passed),
                case("msr", Verdict::Failed("expected 1, got 2".into())),
                case("x2apic", Verdict::Skipped("not offered".into())),
            ]
        );
        assert_eq!(cases.count(is_failure), 1);
    }

    #[test]
    fn a_guest_that_stops_early_fails() {
        assert_eq!(failures("ok a\nok b\n"), ["|it never finished; its last case was b"]);
        assert_eq!(failures(""), ["|it never finished; its last case was none"]);
    }

    #[test]
    fn a_summary_must_agree_with_the_lines() {
        assert_eq!(failures("ok a\ndone 2 passed, 0 failed\n").len(), 1);
        assert_eq!(failures("ok a\ndone 1 passed, 0 failed\n").len(), 0);
        assert_eq!(failures("FAIL a\ndone 0 passed, 1 failed\n"), ["a|the guest does not say why"]);
        assert_eq!(failures("done 0 passed, 0 failed\n"), ["|it ran no case"]);
        assert_eq!(failures("ok a\ndone some passed, 0 failed\n").len(), 1);
    }

    #[test]
    fn a_requirement_adds_a_failure_only_when_it_does_not_hold() {
        let mut cases = Cases::passed();
        cases.require(true, || "no".into());
        assert_eq!(cases.count(is_failure), 0);
        cases.require(false, || "status 3".into());
        assert_eq!(cases.count(is_failure), 1);
    }
}
