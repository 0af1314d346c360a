//! Programs to run: a command line that can be shown before it runs and repeated by hand afterwards.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::say;

/// A program, its arguments and the environment variables it needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    dir: Option<PathBuf>,
    env: Vec<(OsString, OsString)>,
    program: OsString,
    args: Vec<OsString>,
}

impl CommandLine {
    /// A command line with no arguments yet.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { program: program.as_ref().to_owned(), ..Self::default() }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Runs the program in the folder `dir`.
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// The program.
    pub fn program(&self) -> &OsStr {
        &self.program
    }

    /// Whether `arg` is among the arguments.
    pub fn has_arg(&self, arg: &str) -> bool {
        self.args.iter().any(|a| a == arg)
    }

    /// The argument that follows `option`, if there is one.
    pub fn value_of(&self, option: &str) -> Option<&str> {
        let at = self.args.iter().position(|a| a == option)?;
        self.args.get(at + 1)?.to_str()
    }

    /// The same as a [`Command`].
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.env.iter().map(|(k, v)| (k, v)));
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    /// Shows the command line and runs it with this process's own input and output; an error if it fails.
    pub fn run(&self) -> Result<()> {
        say!("{self}");
        let status = self.command().status().with_context(|| format!("cannot start `{self}`"))?;
        self.check(status)
    }

    /// As [`CommandLine::run`], but the program's standard output goes to standard error.
    pub fn run_on_stderr(&self) -> Result<()> {
        say!("{self}");
        let status = self
            .command()
            .stdin(Stdio::null())
            .stdout(std::io::stderr())
            .status()
            .with_context(|| format!("cannot start `{self}`"))?;
        self.check(status)
    }

    /// As [`CommandLine::run_on_stderr`], but ends the program after `limit`.
    pub fn run_within(&self, limit: Duration) -> Result<()> {
        say!("{self}");
        let child = self
            .command()
            .stdin(Stdio::null())
            .stdout(std::io::stderr())
            .spawn()
            .with_context(|| format!("cannot start `{self}`"))?;
        match wait_within(child, limit)? {
            Some(status) => self.check(status),
            None => bail!("`{self}` was ended after {} s without a result", limit.as_secs()),
        }
    }

    /// Runs the program quietly; its output is shown only if it fails.
    pub fn run_quietly(&self) -> Result<()> {
        let output = self.output()?;
        if output.status.success() {
            return Ok(());
        }
        let text = [output.stdout, output.stderr].concat();
        bail!("`{self}` failed ({}):\n{}", output.status, String::from_utf8_lossy(&text).trim_end());
    }

    /// Runs the program quietly and returns its standard output; an error if it fails.
    pub fn read(&self) -> Result<String> {
        let output = self.output()?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr);
            bail!("`{self}` failed ({}): {}", output.status, why.trim_end());
        }
        String::from_utf8(output.stdout).with_context(|| format!("the output of `{self}` is not text"))
    }

    fn output(&self) -> Result<Output> {
        self.command().stdin(Stdio::null()).output().with_context(|| format!("cannot start `{self}`"))
    }

    fn check(&self, status: ExitStatus) -> Result<()> {
        if !status.success() {
            bail!("`{self}` failed ({status})");
        }
        Ok(())
    }
}

/// As a shell would take it.
impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(dir) = self.dir.as_ref().filter(|dir| std::env::current_dir().ok().as_ref() != Some(dir))
        {
            write!(f, "cd {} && ", quoted(dir.as_os_str()))?;
        }
        for (name, value) in &self.env {
            write!(f, "{}={} ", name.to_string_lossy(), with_path(value).unwrap_or_else(|| quoted(value)))?;
        }
        write!(f, "{}", quoted(&self.program))?;
        self.args.iter().try_for_each(|arg| write!(f, " {}", quoted(arg)))
    }
}

/// `value` with the long search path at its end as the variable it is.
fn with_path(value: &OsStr) -> Option<String> {
    let path = std::env::var("PATH").ok().filter(|path| !path.is_empty())?;
    let before = value.to_str()?.strip_suffix(&path)?.strip_suffix(':')?;
    Some(format!("{}:\"$PATH\"", quoted(before.as_ref())))
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Waits for `child`, but kills it after `limit` (`None`).
pub fn wait_within(mut child: Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The first folder of `PATH` that holds the program `name`, joined with it.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// The last `lines` lines of what `source` holds; nothing if it cannot be read.
pub fn tail(source: &mut impl Read, lines: usize) -> String {
    let mut bytes = Vec::new();
    if source.read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_is_shown_as_a_shell_takes_it() {
        let line = CommandLine::new("qemu").env("A", "x y").args(["-m", "2048M", "it's", ""]);
        assert_eq!(line.to_string(), r"A='x y' qemu -m 2048M 'it'\''s' ''");
        assert_eq!(line.value_of("-m"), Some("2048M"));
        assert!(line.has_arg("it's") && !line.has_arg("its"));
    }

    #[test]
    fn failure_names_the_command_and_shows_its_output() {
        let error = CommandLine::new("sh").args(["-c", "echo why >&2; exit 3"]).run_quietly().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("sh -c") && text.contains("why") && text.contains('3'), "{text}");
        assert!(CommandLine::new("/nonexistent/program").read().is_err());
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let start = Instant::now();
        let error = CommandLine::new("sleep").arg("60").run_within(Duration::from_millis(100)).unwrap_err();
        assert!(error.to_string().contains("was ended"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn the_tail_is_the_last_lines() {
        assert_eq!(tail(&mut &b"a\nb\nc\n"[..], 2), "b\nc");
        assert_eq!(tail(&mut &b""[..], 2), "");
    }
}
