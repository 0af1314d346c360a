//! What a scenario is.

use std::time::Duration;

use crate::cases::Cases;
use crate::context::Ctx;

/// Something a scenario cannot run without, which some machines cannot have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Need {
    /// The Linux guest in the cache.
    Linux,
    /// GRUB's image tools.
    Grub,
    /// UEFI firmware.
    Uefi,
    /// Bochs.
    Bochs,
}

type Body = Box<dyn Fn(&Ctx) -> anyhow::Result<Cases> + Send + Sync>;

/// One conversation with one or more machines.
pub(crate) struct Scenario {
    /// Its name; also that of its log's folder.
    pub(crate) name: String,
    pub(crate) needs: Vec<Need>,
    /// Runs only with `--long`.
    pub(crate) long: bool,
    /// All its waiting together ends after this time.
    pub(crate) limit: Duration,
    body: Body,
}

impl Scenario {
    /// A scenario that needs nothing special, with a limit of a minute.
    pub(crate) fn new(
        name: impl Into<String>,
        body: impl Fn(&Ctx) -> anyhow::Result<Cases> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            needs: vec![],
            long: false,
            limit: Duration::from_secs(60),
            body: Box::new(body),
        }
    }

    pub(crate) fn needs(mut self, needs: &[Need]) -> Self {
        self.needs.extend(needs);
        self
    }

    pub(crate) fn long(mut self) -> Self {
        self.long = true;
        self
    }

    pub(crate) fn limit(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Runs it; an error is a failure of the scenario as a whole.
    pub(crate) fn run(&self, ctx: &Ctx) -> Cases {
        (self.body)(ctx).unwrap_or_else(|error| Cases::failed(format!("{error:#}")))
    }
}
