//! Names the mutants, for `cargo xtask test --mutants`: a line for each, with parts of the names of tests that are likely to
//! catch it. In a build without `--cfg mutants` there are none.
fn main() {
    #[cfg(mutants)]
    for (name, tests) in mmu::MUTANTS {
        println!("mutant {name} {}", tests.join(" "));
    }
}
