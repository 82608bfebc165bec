/*-------------------------------------------------------------------------
 *
 * rewrite.h
 *	  The method online_rewrite: what its files share.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_REWRITE_H
#define RM_REWRITE_H

#include "access/tableam.h"
#include "migration.h"
#include "nodes/execnodes.h"
#include "storage/itemptr.h"
#include "twin.h"
#include "utils/snapshot.h"

/* positions in the list of steps */
typedef enum RmRewriteStep
{
	RM_REWRITE_BEGIN,
	RM_REWRITE_COPY,
	RM_REWRITE_INDEX,
	RM_REWRITE_CATCH_UP,
	RM_REWRITE_VERIFY,
	RM_REWRITE_CUT_OVER,
	RM_REWRITE_FINISH
} RmRewriteStep;

/*
 * Phases of the step begin, which the step copy goes through too, where what there
 * is cannot be used: m->leaf says of which partition then, or (0) that it is all.
 */
typedef enum RmBeginPhase
{
	RM_BEGIN_NOTHING,
	RM_BEGIN_ANEW,				/* what there is goes */
	RM_BEGIN_TABLES,			/* shadows and logs are made */
	RM_BEGIN_LOGS				/* from here on the logs have every change */
} RmBeginPhase;

/*
 * What the method keeps of a table that holds rows, which is the migration's or a
 * partition of it: a row of risky_migrations.rewrite, loaded anew in each
 * transaction, as the migration's own.
 */
typedef struct RmRewrite
{
	int64		id;				/* of the migration */
	Oid			relid;
	List	   *attnums;		/* of the migration's columns, there */
	int			steps_done;		/* of the method's list, for this table */
	Oid			relfilenode;	/* which it had when the log began */
	int64		end_block;		/* pages at that time */
	Oid			shadow;			/* the shadow table */
	Oid			log;			/* the change log */
	Oid			key_index;		/* of the table: its columns tell the rows apart */
	int64		trigger_mark;	/* see rm_rewrite_trigger_mark() */
	char	   *ground;			/* columns and CHECK constraints when it began */
	/* S0: the transactions that were in progress when the log began */
	uint64		next_xid;		/* with epoch: this and later ones had not begun */
	TransactionId xmin;			/* all before it had ended */
	TransactionId *running;		/* in between: these had not, in order */
	int			nrunning;
	bool		overflowed;		/* some subtransactions are not among them */
	Oid			shadow_storage; /* its relfilenode */
	int64		rows_failed;	/* at the last catch-up: rows without a new version */
	char	   *fingerprint;	/* of the catalogs when the indexes were built, or NULL */
	TimestampTz analyzed;		/* when the shadow was, or 0 */
	Snapshot	snapshot;		/* to be read with, or NULL: a new one each time */
} RmRewrite;

/* pages of the shadow in one chunk */
#define RM_CHUNK_PAGES 128
/* so many pages are worth a process, and what is offered to helpers has multiples of them */
#define RM_REWRITE_RANGE_PAGES 1024
/* what is shared out among workers has multiples of so many */
#define RM_REWRITE_RANGE_UNIT 256

/* a place in the table as the chunks have it, and the first one of a page */
#define RM_ROW_PLACE(block, offset) (((int64) (block) << 16) | (offset))
#define RM_PAGE_PLACE(block) RM_ROW_PLACE(block, 0)

/*
 * When a round was: what its snapshot saw, and its own transaction.  Outlives the
 * snapshot, which would hold back VACUUM.
 */
typedef struct RmMark
{
	TransactionId xid;
	SnapshotData snapshot;		/* of the lists of xids and nothing else */
} RmMark;

/* rows that are made at once */
#define RM_TRANSFER_ROWS 128

/* a column that changes, in one transaction */
typedef struct RmTransferColumn
{
	const RmConversionDef *def;
	AttrNumber	attnum;			/* in the table, and in the shadow */
	RmConversion *conv;
} RmTransferColumn;

/*
 * The rows of the table on their way to the shadow, in one transaction; see
 * rewrite_transfer.c.
 */
typedef struct RmTransfer
{
	RmMigration *m;
	RmRewrite  *rw;
	Relation	rel;			/* the table */
	Relation	shadow;
	Snapshot	snapshot;
	int64		failed;			/* rows that could not be made */

	/* the rows under way, where they lie in buffers, which are pinned once each */
	int			nrows;
	TupleTableSlot *rows[RM_TRANSFER_ROWS];
	HeapTupleData tuples[RM_TRANSFER_ROWS];
	int			npins;
	Buffer		pins[RM_TRANSFER_ROWS];
	/* what they become, NULL what cannot be made; good until they are cleared */
	HeapTuple	made[RM_TRANSFER_ROWS];

	int			ncolumns;
	RmTransferColumn *columns;
	const RmTransferColumn *column;	/* under way, or NULL */
	TupleTableSlot *new_slot;	/* of the shadow; virtual */
	MemoryContext made_cxt;
	MemoryContext row_cxt;		/* for anybody to use and reset */
	EState	   *estate;
	ResultRelInfo *rri;			/* of the shadow; its indexes are open if asked for */
	Oid			save_userid;
	int			save_sec_context;
} RmTransfer;

/* rewrite.c */
extern List *rm_rewrite_load_all(const RmMigration *m);
extern RmRewrite *rm_rewrite_load(const RmMigration *m, Oid relid);
extern void rm_rewrite_save(const RmRewrite *rw);
extern void rm_rewrite_rehearse(RmMigration *m);
extern void rm_rewrite_refuse(Relation rel, List *columns);
extern void rm_rewrite_refuse_obstacles(Relation rel, List *columns);
extern char *rm_rewrite_shadow_name(int64 id, Oid original);
extern RmTwin rm_rewrite_make_twin(RmMigration *m, Oid relid);
extern Oid	rm_rewrite_shadow_index(const RmRewrite *rw, Oid original);
extern Oid	rm_rewrite_shadow_key(const RmRewrite *rw);
extern bool rm_rewrite_key_converts(const RmRewrite *rw);
extern bool rm_rewrite_by_leaf(const RmMigration *m);
extern Oid	rm_rewrite_create_table(const char *name, Relation rel, Oid tablespace, TupleDesc desc,
									Datum options);
extern List *rm_rewrite_tables_with_trigger(const RmMigration *m);
extern RmStepResult rm_rewrite_begin(RmRun *run);
extern RmStepResult rm_rewrite_nothing(RmRun *run);
extern void rm_rewrite_drop(const RmRewrite *rw);
extern void rm_rewrite_forget(const RmMigration *m);
extern void rm_rewrite_clear(const RmMigration *m);
extern void rm_rewrite_drop_trigger(const RmMigration *m);
extern bool rm_rewrite_has_right_toast(Relation rel, Relation shadow);
extern const char *rm_rewrite_missed(RmMigration *m, RmRewrite *rw, Relation rel);
extern bool rm_rewrite_stands(RmRun *run, RmRewrite *rw, Relation rel, RmStepResult *result);
extern RmRewrite *rm_rewrite_next(RmRun *run, Relation *rel, RmStepResult *result);
extern RmRewrite *rm_rewrite_help(RmRun *run, Relation *rel);
extern bool rm_rewrite_all(RmRun *run, List **list, RmStepResult *result);
extern RmStepResult rm_rewrite_table_done(RmRun *run, RmRewrite *rw);
extern RmStepResult rm_rewrite_back_to(RmRun *run, RmRewrite *rw, RmRewriteStep step);
extern RmStepResult rm_rewrite_start_over(RmRun *run, Oid relid, const char *why);
extern void rm_rewrite_progress(RmRun *run, RmRewrite *rw);

/* rewrite_index.c */
extern bool rm_rewrite_indexes_complete(const RmRewrite *rw);
extern void rm_rewrite_analyze(RmRewrite *rw);
extern void rm_rewrite_explain(RmRun *run, ErrorData *error);

/* rewrite_transfer.c */
extern RmTransfer *rm_transfer_begin(RmMigration *m, RmRewrite *rw, Relation rel,
									 LOCKMODE shadow_lock, bool indexes);
extern void rm_transfer_end(RmTransfer *t);
extern bool rm_transfer_is_full(const RmTransfer *t);
extern bool rm_transfer_add(RmTransfer *t, HeapTuple tup, Buffer buf);
extern bool rm_transfer_add_slot(RmTransfer *t, TupleTableSlot *slot);
extern void rm_transfer_make(RmTransfer *t);
extern void rm_transfer_clear(RmTransfer *t);

/* rewrite_copy.c */
extern void rm_chunks_forget(Oid shadow);
extern BlockNumber rm_chunks_end(Oid shadow);
extern int64 rm_chunks_unverified(Oid shadow);
extern void rm_chunks_unverify(Oid shadow);
extern void rm_chunks_changed(Oid shadow, const Bitmapset *pages, const Bitmapset *rows);

/* rewrite_verify.c */
extern void rm_verify_beside(RmRun *run);
extern int	rm_rewrite_verifiers(int64 pages);

/* rewrite_log.c */
extern Oid	rm_log_create(int64 id, Relation rel, Relation key_index);
extern void rm_log_key(Relation log, TupleTableSlot *slot);
extern int64 rm_log_count(Relation log, Snapshot snapshot, int64 limit);

/* rewrite_replay.c */
extern int64 rm_replay(RmRun *run, RmRewrite *rw, Relation rel, int64 *counts);
extern int64 rm_replay_round(RmRun *run, RmRewrite *rw, Relation rel, int64 *counts);

/* rewrite_versions.c */
extern RmMark *rm_mark_of(Snapshot snapshot, MemoryContext cxt);
extern bool rm_replay_versions(RmRun *run, RmRewrite *rw, Relation rel, const RmMark *mark);

extern const RmStep rm_step_rewrite_begin;
extern const RmStep rm_step_rewrite_copy;
extern const RmStep rm_step_rewrite_index;
extern const RmStep rm_step_rewrite_catch_up;
extern const RmStep rm_step_rewrite_verify;
extern const RmStep rm_step_rewrite_cut_over;
extern const RmStep rm_step_rewrite_finish;

#endif							/* RM_REWRITE_H */
