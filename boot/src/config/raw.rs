//! The shape of umbra.toml for serde: which keys there are. Values are taken as they come, with their place in the
//! text, and judged in `read`, where an error can name the key.
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use toml::Spanned;

/// A value with its place.
pub(super) type Placed = Spanned<Value>;

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) umbra: Option<Section<Umbra>>,
    #[serde(default)]
    pub(super) vm: Vms,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Umbra {
    pub(super) at_end: Option<Placed>,
    pub(super) console: Option<Placed>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Vm {
    pub(super) name: Option<Placed>,
    pub(super) vcpus: Option<Placed>,
    pub(super) memory: Option<Placed>,
    pub(super) kernel: Option<Placed>,
    pub(super) initrd: Option<Placed>,
    pub(super) modules: Option<Placed>,
    pub(super) cmdline: Option<Placed>,
    pub(super) mmu: Option<Placed>,
    pub(super) nested: Option<Placed>,
    pub(super) page_size: Option<Placed>,
    pub(super) exit_port: Option<Placed>,
    pub(super) on_reset: Option<Placed>,
    pub(super) console: Option<Placed>,
}

/// A table of keys and values, and nothing else: serde alone would take a list of values in the fields' order too.
pub(super) struct Section<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Section<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SectionVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for SectionVisitor<T> {
            type Value = Section<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a section of keys and values")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Section<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Section)
            }
        }
        deserializer.deserialize_map(SectionVisitor(PhantomData))
    }
}

/// The list of VMs; a type of its own so that `[vm]` gets a helpful error.
#[derive(Default)]
pub(super) struct Vms(pub(super) Vec<Spanned<Section<Vm>>>);

impl<'de> Deserialize<'de> for Vms {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VmsVisitor;
        impl<'de> Visitor<'de> for VmsVisitor {
            type Value = Vms;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a section [[vm]], in double brackets, for each VM")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vms, A::Error> {
                let mut vms = Vec::new();
                while let Some(vm) = list.next_element()? {
                    vms.push(vm);
                }
                Ok(Vms(vms))
            }
        }
        deserializer.deserialize_seq(VmsVisitor)
    }
}

/// Any TOML value, as far as some key of umbra.toml could want it.
pub(super) enum Value {
    Text(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<Spanned<Item>>),
    Other,
}

/// A value in a list.
pub(super) enum Item {
    Text(String),
    Other,
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValueVisitor;
        impl<'de> Visitor<'de> for ValueVisitor {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(text.into()))
            }

            fn visit_i64<E>(self, integer: i64) -> Result<Value, E> {
                Ok(Value::Integer(integer))
            }

            fn visit_bool<E>(self, boolean: bool) -> Result<Value, E> {
                Ok(Value::Boolean(boolean))
            }

            fn visit_i128<E>(self, _: i128) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_u128<E>(self, _: u128) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
                Ok(Value::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Value::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Other)
            }
        }
        deserializer.deserialize_any(ValueVisitor)
    }
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Value::deserialize(deserializer)? {
            Value::Text(text) => Self::Text(text),
            _ => Self::Other,
        })
    }
}
