/*-------------------------------------------------------------------------
 *
 * leaves.h
 *	  The tables that hold a table's rows: itself, its children, or its partitions.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_LEAVES_H
#define RM_LEAVES_H

#include "migration.h"

extern bool rm_is_parted(const RmMigration *m);
extern List *rm_tree(Oid relid);
extern List *rm_tree_leaves(Oid relid);
extern List *rm_members(Oid relid);
extern const char *rm_alter_sql(const RmMigration *m);
extern void rm_lock_tree(RmRun *run, LOCKMODE mode);
extern void rm_lock_tree_and(RmRun *run, LOCKMODE mode, List *others);
extern void rm_invalidate_tree(const RmMigration *m);

extern List *rm_lock_below(Relation root);
extern bool rm_is_leaf_of(Relation rel, Oid root);
extern uint64 rm_leaf_mark(Oid relid, Oid root);
extern AttrNumber rm_leaf_attnum(Oid root, AttrNumber attnum, Oid leaf);
extern Node *rm_leaf_expression(Node *expr, Oid root, Relation rel);
extern RmMigration *rm_migration_on(RmMigration *m, Relation rel);

extern void rm_leaves_begin(RmMigration *m);
extern bool rm_leaves_discover(RmMigration *m);
extern void rm_leaves_forget(RmMigration *m);
extern void rm_leaves_reset(RmMigration *m);
extern void rm_leaves_check_again(RmMigration *m);
extern void rm_leaves_accept_empty(RmRun *run);
extern bool rm_leaf_is_unarmed(const RmMigration *m, Oid relid);
extern bool rm_leaves_arm(RmRun *run);
extern bool rm_leaves_choose(RmRun *run);
extern bool rm_leaves_done(RmMigration *m);
extern Relation rm_leaf_open(RmRun *run, LOCKMODE mode);
extern bool rm_leaves_are_late(const RmMigration *m);
extern bool rm_leaves_watched(RmMigration *m);
extern void rm_leaf_adopt(RmMigration *m, Relation rel);
extern void rm_leaf_done(RmMigration *m);
extern void rm_add_other_leaves(RmRun *run, Oid leaf, const char *sql);
extern void rm_leaves_progress(RmRun *run);

#endif							/* RM_LEAVES_H */
