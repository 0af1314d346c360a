//! The few system calls that the standard library does not offer: raw terminal mode, poll, signals, ptys.
// libc's functions are unsafe to call; nothing here keeps a pointer beyond the call.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Mutex;
use std::time::Duration;

/// What is waited for on a file descriptor, and what came.
pub(crate) struct Watch<'a> {
    fd: BorrowedFd<'a>,
    events: i16,
    revents: i16,
}

impl<'a> Watch<'a> {
    /// Waits until `fd` can be read, and, with `write`, until it can be written.
    pub(crate) fn new(fd: BorrowedFd<'a>, read: bool, write: bool) -> Self {
        let events = if read { libc::POLLIN } else { 0 } | if write { libc::POLLOUT } else { 0 };
        Self { fd, events, revents: 0 }
    }

    /// A read would not block (there may be an end of file or an error to read).
    pub(crate) fn readable(&self) -> bool {
        self.revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0
    }

    /// A write would not block.
    pub(crate) fn writable(&self) -> bool {
        self.revents & (libc::POLLOUT | libc::POLLERR) != 0
    }
}

/// Waits until something comes on one of `watches`, a signal arrives or `timeout` has passed.
pub(crate) fn poll(watches: &mut [Watch<'_>], timeout: Duration) -> io::Result<()> {
    // poll() ignores negative descriptors: how a watch for nothing is skipped.
    let fd = |watch: &Watch<'_>| if watch.events == 0 { -1 } else { watch.fd.as_raw_fd() };
    let mut fds: Vec<libc::pollfd> =
        watches.iter().map(|w| libc::pollfd { fd: fd(w), events: w.events, revents: 0 }).collect();
    // Rounded up, so that the last millisecond is not spent spinning.
    let ms = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: `fds` holds that many initialised entries and outlives the call.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    for (watch, entry) in watches.iter_mut().zip(fds) {
        watch.revents = if result > 0 { entry.revents } else { 0 };
    }
    Ok(())
}

/// The terminal's settings before raw mode, while it is raw.
static COOKED: Mutex<Option<(RawFd, libc::termios)>> = Mutex::new(None);

/// Raw mode of a terminal: every key reaches us at once and none makes a signal. Output is still processed, so a
/// bare line feed starts a new line. Ends when dropped.
pub(crate) struct RawMode(());

impl RawMode {
    /// Switches the terminal `fd` to raw mode, and makes sure that a panic restores it.
    pub(crate) fn enter(fd: RawFd) -> io::Result<Self> {
        let mut cooked = std::mem::MaybeUninit::uninit();
        // SAFETY: `cooked` has room for the structure; the result tells whether it was filled.
        if unsafe { libc::tcgetattr(fd, cooked.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: tcgetattr succeeded, so the structure is initialised.
        let cooked = unsafe { cooked.assume_init() };
        let mut raw = cooked;
        // SAFETY: `raw` is an initialised structure of our own.
        unsafe { libc::cfmakeraw(&mut raw) };
        raw.c_oflag = cooked.c_oflag;
        *COOKED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some((fd, cooked));
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore_terminal();
            before(info);
        }));
        // SAFETY: `raw` is initialised.
        if unsafe { libc::tcsetattr(fd, libc::TCSADRAIN, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Gives the terminal back as it was; does nothing when it is not raw. Input that nobody read is dropped with it:
/// a terminal's late answers to the guest's questions must not end up in the user's shell.
fn restore_terminal() {
    if let Some((fd, cooked)) = COOKED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
        // SAFETY: `cooked` came from tcgetattr.
        unsafe { libc::tcsetattr(fd, libc::TCSAFLUSH, &cooked) };
    }
}

/// The write end of the pipe that signals arrive on, for the handler.
static SIGNAL_PIPE: AtomicI32 = AtomicI32::new(-1);

/// SIGINT, SIGTERM and SIGHUP as bytes on a pipe, so that a run ends in an orderly way.
pub(crate) struct Signals(File);

impl Signals {
    /// Catches the signals from now on, for the rest of the process's life.
    pub(crate) fn catch() -> io::Result<Self> {
        let (read, write) = io::pipe()?;
        let read = File::from(OwnedFd::from(read));
        set_nonblocking(read.as_raw_fd())?;
        // The handler may write at any time until the process ends, so this end stays open for ever.
        let write = std::os::fd::IntoRawFd::into_raw_fd(OwnedFd::from(write));
        SIGNAL_PIPE.store(write, Ordering::SeqCst);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            let handler: extern "C" fn(libc::c_int) = on_signal;
            // SAFETY: `on_signal` does only what a signal handler may: an atomic load and a write().
            if unsafe { libc::signal(signal, handler as libc::sighandler_t) } == libc::SIG_ERR {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(read))
    }

    /// The number of a signal that has arrived.
    pub(crate) fn take(&mut self) -> Option<i32> {
        let mut byte = [0];
        matches!(self.0.read(&mut byte), Ok(1)).then(|| i32::from(byte[0]))
    }
}

impl std::os::fd::AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = [signal as u8];
    // SAFETY: write() is async-signal-safe and `byte` outlives the call; if it fails there is nobody to tell.
    unsafe { libc::write(SIGNAL_PIPE.load(Ordering::SeqCst), byte.as_ptr().cast(), 1) };
}

/// Makes reads and writes of `fd` return instead of waiting.
pub(crate) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl with these commands takes and returns integers only.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A pseudo terminal: our end, and the path of the end that an emulator opens as its serial line.
pub(crate) struct Pty {
    /// Our end.
    pub(crate) master: File,
    /// The other end, held open so that ours does not report a hang-up before the emulator has opened it.
    pub(crate) slave: File,
    /// The path of the other end.
    pub(crate) path: String,
}

/// Opens a pseudo terminal that changes nothing on its way.
pub(crate) fn open_pty() -> io::Result<Pty> {
    let (mut master, mut slave) = (-1, -1);
    // SAFETY: the two integers are ours; name, settings and window size may be null.
    let result = unsafe {
        libc::openpty(
            &mut master,
            &mut slave,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: openpty returned two descriptors that nobody else owns.
    let (master, slave) = unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) };
    let mut settings = std::mem::MaybeUninit::uninit();
    // SAFETY: `settings` has room for the structure.
    if unsafe { libc::tcgetattr(slave.as_raw_fd(), settings.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: tcgetattr succeeded, so the structure is initialised.
    let mut settings = unsafe { settings.assume_init() };
    // SAFETY: the structure is initialised and ours.
    unsafe { libc::cfmakeraw(&mut settings) };
    // SAFETY: as above.
    if unsafe { libc::tcsetattr(slave.as_raw_fd(), libc::TCSANOW, &settings) } != 0 {
        return Err(io::Error::last_os_error());
    }
    close_on_exec(master.as_raw_fd())?;
    close_on_exec(slave.as_raw_fd())?;
    let mut name = [0 as libc::c_char; 128];
    // SAFETY: the buffer's true length is passed; on success it holds a terminated string.
    if unsafe { libc::ttyname_r(slave.as_raw_fd(), name.as_mut_ptr(), name.len()) } != 0 {
        return Err(io::Error::other("the pseudo terminal has no name"));
    }
    // SAFETY: ttyname_r succeeded, so the buffer holds a terminated string.
    let path = unsafe { std::ffi::CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    Ok(Pty { master, slave, path })
}

fn close_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl with this command takes and returns integers only.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes the kernel kill the program that `command` starts when the thread that starts it ends, however it ends.
/// Only Linux can do that; elsewhere the program is killed when its handle is dropped.
pub(crate) fn die_with_parent(command: &mut Command) {
    #[cfg(target_os = "linux")]
    // SAFETY: between fork and exec the closure makes one system call that takes integers.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    // Its own process group: a Ctrl-C meant for us must not end the emulator before we have read its last words.
    command.process_group(0);
}

/// Whether this process is the superuser's.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn a_pty_changes_nothing() {
        let mut pty = open_pty().unwrap();
        let mut other = std::fs::OpenOptions::new().read(true).write(true).open(&pty.path).unwrap();
        other.write_all(b"a\nb\x03").unwrap();
        let mut buffer = [0; 4];
        pty.master.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"a\nb\x03");
        pty.master.write_all(b"\r\x04x").unwrap();
        let mut buffer = [0; 3];
        other.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"\r\x04x");
        assert_eq!(pty.slave.metadata().unwrap().file_type(), other.metadata().unwrap().file_type());
    }

    #[test]
    fn raw_mode_ends_when_it_is_dropped() {
        let settings = |fd| {
            let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
            // SAFETY: `settings` has room for the structure, and is read only if it was filled.
            unsafe {
                assert_eq!(libc::tcgetattr(fd, settings.as_mut_ptr()), 0);
                settings.assume_init()
            }
        };
        let pty = open_pty().unwrap();
        let fd = pty.slave.as_raw_fd();
        let mut cooked = settings(fd);
        cooked.c_lflag |= libc::ICANON | libc::ECHO | libc::ISIG;
        // SAFETY: `cooked` is initialised.
        assert_eq!(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &cooked) }, 0);
        let raw = RawMode::enter(fd).unwrap();
        assert_eq!(settings(fd).c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG), 0);
        drop(raw);
        assert_eq!(settings(fd).c_lflag, cooked.c_lflag);
        restore_terminal();
        assert_eq!(settings(fd).c_lflag, cooked.c_lflag);
    }

    #[test]
    fn poll_tells_which_side_is_ready() {
        let (read, mut write) = io::pipe().unwrap();
        let mut watches = [Watch::new(read.as_fd(), true, false), Watch::new(write.as_fd(), false, true)];
        poll(&mut watches, Duration::ZERO).unwrap();
        assert!(!watches[0].readable() && watches[1].writable());
        write.write_all(b"x").unwrap();
        let mut watches = [Watch::new(read.as_fd(), true, false), Watch::new(write.as_fd(), false, false)];
        poll(&mut watches, Duration::from_secs(10)).unwrap();
        assert!(watches[0].readable() && !watches[1].writable());
    }
}
