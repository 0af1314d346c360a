//! Which accesses a translation permits, as constant tables indexed by role (AMD APM vol. 2, 5.6; Intel SDM vol. 3, 4.6).
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::role::RoleFlags;

/// Forms of access: kind, user or not, SMAP suspended or not.
const ACCESSES: usize = 16;
/// Roles that differ in WP, NX, SMEP or SMAP.
const ROLES: usize = 16;

/// For each form of access the translations that forbid it: bit `n` stands for `Prot` of bits `n`.
pub(super) type Permissions = [u8; ACCESSES];

/// The row of the table for a role.
#[inline]
pub(super) const fn permissions(flags: RoleFlags) -> &'static Permissions {
    &TABLE[flags.bits() as usize % ROLES]
}

/// Position of an access in a row. RFLAGS.AC suspends SMAP for explicit accesses only.
#[inline]
pub(super) const fn index(access: Access, ac: bool) -> usize {
    let user = matches!(access.agent, Agent::User) as usize;
    let suspended = (ac && matches!(access.agent, Agent::Supervisor)) as usize;
    access.kind as usize | user << 2 | suspended << 3
}

/// Whether a translation with `prot` forbids the access at `index`.
#[inline]
pub(super) const fn forbids(permissions: &Permissions, index: usize, prot: Prot) -> bool {
    permissions[index % ACCESSES] >> (prot.bits() & 7) & 1 != 0
}

static TABLE: [Permissions; ROLES] = table();

const fn table() -> [Permissions; ROLES] {
    let mut table = [[0; ACCESSES]; ROLES];
    let mut role = 0;
    while role < ROLES {
        let mut access = 0;
        while access < ACCESSES {
            let mut prot = 0;
            while prot < 8 {
                if forbidden(RoleFlags::from_bits_truncate(role as u16), access, prot) {
                    table[role][access] |= 1 << prot;
                }
                prot += 1;
            }
            access += 1;
        }
        role += 1;
    }
    table
}

const fn forbidden(role: RoleFlags, access: usize, prot: u8) -> bool {
    let prot = Prot::from_bits_truncate(prot);
    let write = access & 3 == AccessKind::Write as usize;
    let fetch = access & 3 == AccessKind::Execute as usize;
    let user = access & 1 << 2 != 0;
    let suspended = access & 1 << 3 != 0;
    let user_page = prot.contains(Prot::USER);

    let read_only = write && !prot.contains(Prot::WRITE) && (user || role.contains(RoleFlags::WP));
    let privileged = user && !user_page;
    let no_execute = fetch && !prot.contains(Prot::EXECUTE) && role.contains(RoleFlags::NX);
    let smep = role.contains(RoleFlags::SMEP) && fetch && !user && user_page;
    let smap = role.contains(RoleFlags::SMAP) && !fetch && !user && user_page && !suspended;
    read_only || privileged || no_execute || smep || smap
}
