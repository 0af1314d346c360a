//! Which vCPU runs next on this CPU: round robin over everything that has a reason to run, one slice each.
//!
//! Guests run on the boot CPU. The extended state (FPU and the like) of the vCPU that ran last stays in the
//! registers until another vCPU runs.

mod terminal;
mod timer;

pub use timer::HostTimer;

use crate::cpu::tsc;
use crate::hw::Vendor;
use crate::vm::instance::{Instance, Specification};
use crate::vm::report::End;
use crate::vm::vcpu::Pause;
use alloc::vec::Vec;
use boot::config::OnReset;
use terminal::Terminal;

/// How long a vCPU runs while others wait.
const SLICE_NS: u64 = 2_000_000;
/// What a vCPU gets at least, however soon another one's timer is due: timers of one VM do not starve the others.
const MIN_SLICE_NS: u64 = 300_000;
/// A VM that resets itself starts again this much after its last start at the earliest.
const RESTART_INTERVAL_NS: u64 = 1_000_000_000;
/// How often what the VMs have used is halved, so that only the recent past counts.
const DECAY_NS: u64 = 100_000_000;
/// How often the console is looked at while nothing else happens.
const POLL_NS: u64 = 10_000_000;

/// A place for a VM: its specification outlives its restarts.
struct Place<'a, V: Vendor> {
    specification: Specification<'a, V>,
    /// None once it has ended for good, and between a reset and the start that follows.
    instance: Option<Instance<V>>,
    /// The host's TSC at the last start.
    started: u64,
    /// When it starts again, if it was reset.
    restart_at: Option<u64>,
    /// CPU time used lately, in ticks of the TSC.
    used: u64,
}

/// Everything that runs on this CPU.
pub struct Scheduler<'a, V: Vendor> {
    places: Vec<Place<'a, V>>,
    timer: HostTimer,
    terminal: Terminal,
    /// Prints the boot report.
    report: &'a dyn Fn(),
    /// The vCPU whose extended state is in the registers: place and index.
    loaded: Option<(usize, usize)>,
    /// Where the search for the next vCPU begins.
    next: (usize, usize),
    /// Times in ticks of the TSC, see the constants of these names.
    slice: u64,
    min_slice: u64,
    poll: u64,
    decay: u64,
    restart_interval: u64,
    /// When what the VMs have used is halved next.
    decay_at: u64,
    status: u8,
}

impl<'a, V: Vendor> Scheduler<'a, V> {
    /// A scheduler of these VMs, of which there is at least one. `report` prints the boot report when someone at the
    /// console asks for it.
    pub fn new(instances: Vec<(Specification<'a, V>, Instance<V>)>, report: &'a dyn Fn()) -> Self {
        let rate = tsc::rate();
        let places: Vec<_> = instances
            .into_iter()
            .map(|(specification, instance)| Place {
                specification,
                instance: Some(instance),
                started: tsc::read(),
                restart_at: None,
                used: 0,
            })
            .collect();
        let mut scheduler = Self {
            terminal: Terminal::new(places.len()),
            report,
            places,
            timer: HostTimer::new(),
            loaded: None,
            next: (0, 0),
            slice: rate.ticks(SLICE_NS),
            min_slice: rate.ticks(MIN_SLICE_NS),
            poll: rate.ticks(POLL_NS),
            decay: rate.ticks(DECAY_NS),
            restart_interval: rate.ticks(RESTART_INTERVAL_NS),
            decay_at: 0,
            status: 0,
        };
        scheduler.show_focus();
        scheduler
    }

    /// Runs everything until every VM has ended; the exit status of the worst end.
    pub fn run(mut self) -> u8 {
        loop {
            self.poll_console();
            self.settle_ends();
            self.restart_due();
            if self.places.iter().all(|place| place.instance.is_none() && place.restart_at.is_none()) {
                return self.status;
            }
            let now = tsc::read();
            self.forget_the_past(now);
            self.wake_due(now);
            match self.pick() {
                Some(chosen) => self.run_one(chosen),
                None => {
                    let until =
                        self.next_deadline(None, now).unwrap_or(u64::MAX).min(now.saturating_add(self.poll));
                    self.timer.idle_until(until);
                }
            }
        }
    }

    fn run_one(&mut self, (place, index): (usize, usize)) {
        let crowded = self.has_other_runnable((place, index));
        let slice = if crowded { self.slice } else { self.poll };
        self.load(place, index);
        let now = tsc::read();
        let others = self.next_deadline(Some((place, index)), now).unwrap_or(u64::MAX);
        let until = now.saturating_add(slice).min(others.max(now.saturating_add(self.min_slice)));
        let Some(instance) = &mut self.places[place].instance else { return };
        let Some(vcpu) = instance.vcpus.get_mut(index) else { return };
        let pause = vcpu.run(&instance.guest, &mut self.timer, until);
        self.places[place].used += tsc::read().saturating_sub(now);
        let Some(instance) = &mut self.places[place].instance else { return };
        let Some(vcpu) = instance.vcpus.get_mut(index) else { return };
        for woken in vcpu.take_woken() {
            if let Some(other) = instance.vcpus.get_mut(woken) {
                other.kick();
            }
        }
        if pause == Pause::Idle
            && instance.vcpus.iter().all(|vcpu| vcpu.is_dead(&instance.guest))
            && !instance.guest.board.lock().ioapic.has_unmaskable_pin()
        {
            instance.guest.end(End::Halted);
        }
    }

    /// Makes the registers hold the extended state of this vCPU.
    fn load(&mut self, place: usize, index: usize) {
        if self.loaded == Some((place, index)) {
            return;
        }
        self.unload();
        if let Some(vcpu) = self.places[place].instance.as_mut().and_then(|it| it.vcpus.get_mut(index)) {
            vcpu.switch_in();
            self.loaded = Some((place, index));
        }
    }

    fn unload(&mut self) {
        if let Some((place, index)) = self.loaded.take() {
            if let Some(vcpu) = self.places[place].instance.as_mut().and_then(|it| it.vcpus.get_mut(index)) {
                vcpu.switch_out();
            }
        }
    }

    /// Place and index of the next runnable vCPU, beginning behind the one that ran last.
    fn pick(&mut self) -> Option<(usize, usize)> {
        let mut before = None;
        for (place, it) in self.places.iter().enumerate() {
            let Some(instance) = &it.instance else { continue };
            for (index, vcpu) in instance.vcpus.iter().enumerate() {
                let at = (place, index);
                let behind = at >= self.next;
                if (behind || before.is_none()) && vcpu.is_runnable(&instance.guest) {
                    if behind {
                        self.next = (place, index + 1);
                        return Some(at);
                    }
                    before = Some(at);
                }
            }
        }
        let (place, index) = before?;
        self.next = (place, index + 1);
        before
    }

    fn has_other_runnable(&self, this: (usize, usize)) -> bool {
        for (place, it) in self.places.iter().enumerate() {
            let Some(instance) = &it.instance else { continue };
            for (index, vcpu) in instance.vcpus.iter().enumerate() {
                if (place, index) != this && vcpu.is_runnable(&instance.guest) {
                    return true;
                }
            }
        }
        false
    }

    /// Halves what each VM has used, now and then.
    fn forget_the_past(&mut self, now: u64) {
        if now >= self.decay_at {
            self.decay_at = now.saturating_add(self.decay);
            self.places.iter_mut().for_each(|place| place.used /= 2);
        }
    }

    /// The earliest moment, in the host's TSC, at which a vCPU or a chipset wants to be looked at.
    ///
    /// If a vCPU is about to run, it sees to its own deadline and to its VM's chipset, what is runnable anyway has its
    /// turn, and a VM that has used more than the one that is about to run waits for its turn, too.
    fn next_deadline(&self, runs: Option<(usize, usize)>, now: u64) -> Option<u64> {
        let used = runs.map_or(u64::MAX, |(place, _)| self.places[place].used);
        let mut earliest: Option<u64> = None;
        let mut consider = |deadline: Option<u64>| {
            earliest = match (earliest, deadline) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            }
        };
        for (place, it) in self.places.iter().enumerate() {
            consider(it.restart_at);
            let Some(instance) = &it.instance else { continue };
            if it.used > used {
                continue;
            }
            for (index, vcpu) in instance.vcpus.iter().enumerate() {
                let waits = runs.is_none() || !vcpu.is_runnable(&instance.guest);
                if runs != Some((place, index)) && waits {
                    consider(vcpu.deadline(&instance.guest, now));
                }
            }
            let chipset_waits = match runs {
                None => true,
                Some((running, _)) => {
                    running != place
                        && instance.vcpus.first().is_some_and(|first| !first.is_runnable(&instance.guest))
                }
            };
            if chipset_waits {
                consider(instance.guest.chipset_deadline());
            }
        }
        earliest
    }

    /// Kicks every vCPU whose timer, or whose VM's chipset, is due.
    fn wake_due(&mut self, now: u64) {
        let due = |deadline: Option<u64>| deadline.is_some_and(|at| at <= now);
        for instance in self.places.iter_mut().filter_map(|it| it.instance.as_mut()) {
            let chipset_due = due(instance.guest.chipset_deadline());
            for (index, vcpu) in instance.vcpus.iter_mut().enumerate() {
                if due(vcpu.deadline(&instance.guest, now)) || index == 0 && chipset_due {
                    vcpu.kick();
                }
            }
        }
    }

    fn poll_console(&mut self) {
        let places = &mut self.places;
        let focus_before = self.terminal.focus();
        let wants_report = self.terminal.poll(|focus, byte| {
            let Some(instance) = places.get_mut(focus).and_then(|it| it.instance.as_mut()) else {
                return true;
            };
            let taken = instance.guest.type_byte(byte);
            if taken {
                instance.vcpus[0].kick();
            }
            taken
        });
        if wants_report {
            (self.report)();
        }
        if self.terminal.focus() != focus_before {
            self.show_focus();
            if let Some(instance) = &self.places[self.terminal.focus()].instance {
                log::info!("console: now of vm \"{}\"", instance.guest.name);
            }
        }
    }

    /// Tells each VM whether the console shows its output as it comes.
    fn show_focus(&mut self) {
        let focus = self.terminal.focus();
        for (place, it) in self.places.iter().enumerate() {
            if let Some(instance) = &it.instance {
                instance.guest.set_focus(place == focus);
            }
        }
    }

    /// Reports VMs that ended, and starts those again that were reset.
    fn settle_ends(&mut self) {
        for place in 0..self.places.len() {
            let Some(instance) = &self.places[place].instance else { continue };
            let Some(end) = instance.guest.how_it_ended() else { continue };
            instance.guest.output.flush();
            log::info!("vm \"{}\": {end}", instance.guest.name);
            if self.loaded.is_some_and(|(loaded, _)| loaded == place) {
                self.loaded = None;
            }
            // The old instance goes first: its memory is what the new one is made of.
            self.places[place].instance = None;
            let it = &mut self.places[place];
            if end == End::Reset && it.specification.config.on_reset == OnReset::Restart {
                // A VM that resets itself without end does not keep the others waiting.
                it.restart_at = Some(tsc::read().max(it.started.saturating_add(self.restart_interval)));
            } else {
                self.status = self.status.max(end.status());
            }
        }
    }

    /// Starts VMs again whose time after a reset has come.
    fn restart_due(&mut self) {
        for place in 0..self.places.len() {
            let it = &mut self.places[place];
            if it.restart_at.is_none_or(|at| tsc::read() < at) {
                continue;
            }
            (it.restart_at, it.started) = (None, tsc::read());
            match it.specification.create() {
                Ok(instance) => it.instance = Some(instance),
                Err(error) => {
                    log::error!("vm \"{}\": {error}", it.specification.config.name);
                    self.status = self.status.max(crate::power::VM_ERROR);
                }
            }
            self.show_focus();
        }
    }
}
