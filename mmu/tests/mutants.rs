//! Names the mutants, for `cargo xtask test --mutants`: a line for each, with parts of the names of tests that are likely to
//! catch it, or that it must be one with the bug's name. In a build without `--cfg mutants` there are none.
fn main() {
    #[cfg(mutants)]
    for mutant in mmu::MUTANTS {
        let word = if mutant.row { "bug" } else { "mutant" };
        println!("{word} {} {}", mutant.name, mutant.by.join(" "));
    }
}
