//! Intel VMX with EPT. SDM vol. 3, chapters 24 to 31.

pub mod access_rights;
pub mod capabilities;
pub mod check;
pub mod choice;
pub mod controls;
pub mod event;
pub mod exit;
pub mod instruction_error;
pub mod vmcs;
