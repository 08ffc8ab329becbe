//! Places in a core's table of registered files: who has which, and which are to be emptied.
//!
//! The kernel holds a registered file open. Dropping the last [`Fd`](crate::Fd) therefore puts its
//! place on a list, and the core empties the places on it in the same turn, before it sleeps: the
//! file is then as free for others (locks, exclusive opens) as any closed one.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

/// Places in the table. What does not find one works without, a little slower.
pub(crate) const PLACES: u32 = 256;

/// The places that nobody has. Lives as long as the last [`Registered`].
pub(crate) struct Places {
    free: RefCell<Vec<u32>>,
    left: RefCell<Vec<u32>>,
}

impl Places {
    pub(crate) fn new() -> Rc<Places> {
        let left = RefCell::new(Vec::with_capacity(PLACES as usize));
        Rc::new(Places { free: RefCell::new((0..PLACES).rev().collect()), left })
    }

    /// Takes a free place.
    pub(crate) fn take(self: &Rc<Self>) -> Option<Registered> {
        let index = self.free.borrow_mut().pop()?;
        Some(Registered { index, places: Rc::clone(self) })
    }

    /// A place whose user has gone, to be emptied and then [given back](Places::put).
    pub(crate) fn next_left(&self) -> Option<u32> {
        self.left.borrow_mut().pop()
    }

    /// Whether there is a place to be emptied.
    pub(crate) fn has_left(&self) -> bool {
        !self.left.borrow().is_empty()
    }

    /// The place is empty again.
    pub(crate) fn put(&self, index: u32) {
        self.free.borrow_mut().push(index);
    }
}

/// One place in the table.
pub(crate) struct Registered {
    index: u32,
    places: Rc<Places>,
}

impl Registered {
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    pub(crate) fn is_of(&self, places: &Rc<Places>) -> bool {
        Rc::ptr_eq(&self.places, places)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.places.left.borrow_mut().push(self.index);
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Registered").field(&self.index).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_again_only_when_it_was_emptied() {
        let places = Places::new();
        let taken: Vec<Registered> = (0..PLACES).filter_map(|_| places.take()).collect();
        assert_eq!(taken.len(), PLACES as usize);
        assert!(places.take().is_none() && !places.has_left());
        assert_eq!(taken[7].index(), 7);
        assert!(taken[7].is_of(&places) && !taken[7].is_of(&Places::new()));
        drop(taken);
        assert!(places.has_left() && places.take().is_none(), "not emptied yet");
        while let Some(index) = places.next_left() {
            places.put(index);
        }
        assert_eq!((0..PLACES).filter_map(|_| places.take()).count(), PLACES as usize);
    }
}
