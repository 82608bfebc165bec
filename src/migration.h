/*-------------------------------------------------------------------------
 *
 * migration.h
 *	  A migration, the methods that carry it out, and the step runner.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_MIGRATION_H
#define RM_MIGRATION_H

#include "conversion.h"
#include "locks.h"
#include "utils/relcache.h"

typedef struct RmMethod RmMethod;
typedef struct RmRun RmRun;
typedef struct RmThrottle RmThrottle;
typedef struct RmCrew RmCrew;

/* what is wanted of the runner of a migration, see steer.c */
typedef enum RmWanted
{
	RM_WANT_RUN,
	RM_WANT_PAUSED,
	RM_WANT_CANCELLED
} RmWanted;

/*
 * One requested change: a row of risky_migrations.migration.  Of one column's type, but
 * for rm_alter_types(), which names any number of them: then the fields of the column
 * tell of the first one, or (attnum 0) of none.
 */
typedef struct RmMigration
{
	int64		id;
	const RmMethod *method;
	char	   *method_reason;	/* when made: why it was chosen, or NULL */
	char	   *state;			/* open, done, rolled back */
	int			steps_done;		/* of the method's list, from its beginning */
	int			phase;			/* of the step under way; 0 at its beginning */
	Oid			owner;			/* the role that started it */
	Oid			relid;
	char	   *relation;		/* qualified name when it started, or was last planned */
	List	   *columns;		/* of RmConversionDef: all that change; method direct and
								 * online_rewrite */
	AttrNumber	attnum;
	char	   *column;
	char	   *old_type;		/* as told to people */
	Oid			old_type_id;
	char	   *old_collation;	/* where not the type's default, for the way back */
	char	   *old_storage;
	char	   *old_compression;
	char	   *new_type;
	Oid			new_type_id;
	int32		new_typmod;
	AttrNumber	new_attnum;		/* shadow column, 0 while there is none */
	char	   *new_column;		/* its name */
	char	   *using_expr;		/* see RmConversionDef */
	char	   *reverse_expr;	/* from new to old over the column's name, or NULL */
	bool		null_on_error;	/* what does not convert becomes NULL for good */
	char	   *exact_check;	/* over old: does the new value tell the old one? */
	char	   *reverse_check;	/* over new: does the old type tell the new one? */
	List	   *settings;
	char	   *tree;
	int			server_version;
	bool		enforced;		/* the new column's constraints hold */
	int64		trigger_xmin;	/* rm_trigger_xmin() when verification began */
	bool		by_leaf;		/* partitioned, or has children: see leaves.c */
	Oid			leaf;			/* whose rows are under way; 0: the table's own */
	Oid			relfilenode;	/* to which block numbers belong */
	int64		next_block;		/* below it everything is done */
	int64		end_block;		/* fixed when the work began */
	int			ranges;			/* into which the pages are cut, see crew.c; or 0 */
	int64		rows_done;
	int64		rows_estimated;
	int64		inexact_rows;	/* rows the way back cannot restore */
	char	   *old_column;		/* what the column is called after the swap */
	bool		swapped;		/* the shadow column has taken its place */
	char	   *reverse_tree;	/* keeps the old column in step; NULL: it is not */
	char	   *fingerprint;	/* of the catalogs when all was built */
	RmWanted	wanted;			/* as it was when this was loaded */
} RmMigration;

/* what a call of a step's function has achieved */
typedef enum RmStepResult
{
	RM_STEP_AGAIN,				/* commit, then call it again */
	RM_STEP_DONE,				/* commit, the step is complete */
	RM_STEP_BACK				/* commit, an earlier step comes next: it has
								 * written which into steps_done */
} RmStepResult;

/* one step; its functions run inside a transaction of the runner */
typedef struct RmStep
{
	const char *name;
	bool		throttled;		/* its first transaction may be held back */
	bool		writes_pages;	/* so much that their images in the WAL are compressed */
	/* does one transaction's worth of work */
	RmStepResult (*apply) (RmRun *run);
	/* undoes the whole step, likewise */
	RmStepResult (*revert) (RmRun *run);
	/* after each commit, outside of transactions that hold anything: notices */
	void		(*committed) (RmRun *run, RmStepResult result);
	/* after a transaction failed and was rolled back: true to call it again */
	bool		(*retry) (RmRun *run, ErrorData *error);
	/* before an error is reported: adds what a user should know */
	void		(*explain) (RmRun *run, ErrorData *error);
	/*
	 * Of a method's first step, that has failed and left the table as it was: drops
	 * what its earlier transactions have made.  Has a transaction and SPI, and takes
	 * no lock on the table.
	 */
	void		(*abandon) (RmMigration *m);
	/* not run as one of all steps: only when the user says so */
	bool		on_request;
	/* cut_over => 'manual' stops before it */
	bool		cuts_over;
	/* no lock that blocks others follows the one that it takes */
	bool		locks_once;
	/* in a helper, which has taken run->range: as apply, see crew.h */
	void		(*help) (RmRun *run);
} RmStep;

struct RmMethod
{
	const char *name;
	const RmStep *const *steps;
	int			nsteps;
};

extern const RmMethod rm_method_direct;
extern const RmMethod rm_method_three_step;
extern const RmMethod rm_method_online_rewrite;

/* positions in the list of three_step */
typedef enum RmThreeStep
{
	RM_ADD_COLUMN,
	RM_BACKFILL,
	RM_ENFORCE_NOT_NULL,
	RM_BUILD,
	RM_SWAP,
	RM_CLEANUP
} RmThreeStep;

/* how far a step is, for rm_progress; a total of 0 is not known */
typedef struct RmProgress
{
	int64		blocks_first;	/* where this run began */
	int64		blocks_done;
	int64		blocks_total;
	int64		rows_first;
	int64		rows_done;
	int64		rows_total;		/* estimated */
} RmProgress;

/* pages that one process works on, in one transaction after the other */
typedef struct RmRange
{
	int			number;			/* 0: all, and the state row says how far */
	bool		fresh;			/* not worked on before this transaction */
	Oid			relid;
	Oid			relfilenode;	/* to which block numbers belong */
	int64		next_block;		/* below it everything is done */
	int64		end_block;
	int64		rows_checked;	/* done so far; a step counts what it likes */
	int64		rows_changed;
	int64		rows_failed;
	int64		rows_nulled;
} RmRange;

/* sums over all ranges */
typedef struct RmRangeSums
{
	int64		blocks_done;
	int64		rows_checked;
	int64		rows_changed;
	int64		rows_failed;
	int64		rows_nulled;
} RmRangeSums;

/* what helpers have done, for the step log */
typedef struct RmCrewSums
{
	int64		transactions;
	int64		batches;
	int64		rows_changed;
	int64		rows_hot;
	int64		lock_retries;
	int64		wal_bytes;
} RmCrewSums;

/* a step while it runs; everything it points to lives in cxt */
struct RmRun
{
	MemoryContext cxt;			/* survives the transactions */
	int64		migration_id;	/* 0 for a step of the lab without one */
	RmMigration *m;				/* loaded anew in each transaction, or NULL */
	const RmStep *step;
	int			step_index;		/* in the method's list */
	bool		revert;
	int			batch;			/* rows a batch may have at most */
	void	   *work;			/* the step's own, NULL at the beginning */
	const char *approach;		/* for the step log */
	Oid			relid;
	const char *relation;

	/* set by the step for the transaction under way */
	bool		async_commit;	/* work that is lost together with its state */
	int			pause_ms;		/* to rest after the commit */
	bool		wait_for_helpers;	/* or until one of them has committed */
	List	   *old_storage;	/* of the table before it may be rewritten */
	const char *top_level;		/* a statement for a worker after the commit */
	const char *top_level_what;
	Oid			top_level_relid;	/* which it has locked all the while, or 0 */
	int			top_level_tables;	/* that it may lock at most */
	int			back_to;		/* reverting: steps that are done now, if fewer */
	int			rounds;			/* see rm_begin_again() */
	int			tries;			/* for a lock, in vain, since the last commit */
	instr_time	first_try;		/* when the first of them had failed */
	bool		may_hold;		/* nobody waits for what comes next */
	bool		batch_ended;	/* with it: to rest for batch_pause */
	const char *wait_kind;		/* why to rest, if worth telling */
	const char *wait_reason;

	RmRange		range;			/* pages under way */
	RmRangeSums range_sums;		/* of all, and when they were added up */
	instr_time	summed_at;
	int			helpers;		/* that the step can do with now */
	bool		aside;			/* for other work than apply does: they go on with it
								 * however long a transaction of the runner takes, and
								 * nobody is told if there are none */
	bool		busy;			/* there is no processor for these */
	bool		ranges_new;		/* there are ranges that helpers do not know of */
	int			helper;			/* the number of this process; 0: the runner */
	TimestampTz idle_until;		/* of one aside: when it works again */
	RmCrew	   *crew;			/* crew.c's own */
	TimestampTz crew_next;		/* not to be made before; 0: not tried in vain */
	RmCrewSums	crew_sums;		/* of helpers that have gone */

	RmProgress	progress;		/* kept up by the step, where it can tell */
	List	   *leaves;			/* tables of a tree that are still to come, by OID; a step's own */
	Oid			summed_leaf;	/* to which these two belong: pages of the others */
	int64		other_blocks_done;
	int64		other_blocks;
	RmThrottle *throttle;		/* throttle.c's own */

	/* sums for the step log */
	int64		log_id;
	int64		transactions;
	int64		batches;
	int64		rows_changed;
	int64		rows_hot;
	int64		lock_retries;
	RmLockAccount locks;
	instr_time	started;
	double		duration_ms;	/* to the last commit */
	uint64		wal_started;
	TimestampTz last_notice;
};

/* migration.c: rows of state */
extern const RmMethod *rm_method_by_name(const char *name);
extern RmWanted rm_wanted_by_name(const char *name);
extern RmMigration *rm_migration_load(int64 id, bool lock, MemoryContext cxt);
extern int64 rm_migration_insert(RmMigration *m);
extern void rm_migration_save(const RmMigration *m);
extern int64 rm_open_migration(const char *method);
extern void rm_refuse_missing(Oid relid);
extern void rm_check_owner(Oid relid, const char *relation);
extern char *rm_trigger_name(int64 id);
extern const char *rm_relation_sql(Oid relid);
extern TransactionId rm_trigger_row_xmin(Oid relid, const char *name);
extern uint64 rm_expression_mark(const RmMigration *m);
extern int64 rm_trigger_xmin(const RmMigration *m);
extern void rm_refuse_relatives(Oid relid);
extern int64 rm_trigger_xmin_of(const RmMigration *m, Oid relid);
extern char *rm_check_name(const RmMigration *m);
extern char *rm_built_prefix(const RmMigration *m, bool new_side);
extern bool rm_is_built_name(const RmMigration *m, bool new_side,
							 const char *name);
extern bool rm_step_begun(const RmMigration *m);
extern bool rm_reads_other_columns(const RmMigration *m);
extern void rm_refuse_entangled(Oid relid, AttrNumber attnum, const char *tree);
extern void rm_check_ground(const RmMigration *m, Relation rel);
extern RmConversion *rm_migration_conversion(const RmMigration *m, Relation rel,
											 MemoryContext cxt);
extern RmConversion *rm_column_conversion(const RmMigration *m, const RmConversionDef *column,
										  Relation rel, MemoryContext cxt);
extern List *rm_attnums_of(List *columns, Oid relid);
extern char *rm_columns_text(List *columns);
extern char *rm_alter_clauses(List *columns, Oid root, bool emptied);
extern void rm_record_failure(RmMigration *m, const char *row_key,
							  ItemPointer tid, const char *value,
							  ErrorData *error);
extern void rm_forget_failures(const RmMigration *m);

/* runner.c */
extern void rm_procedure_begin(FunctionCallInfo fcinfo, const char *name);
extern void rm_procedure_end(void);
extern void rm_commit(void);
extern void rm_become_runner(const RmMigration *m);
extern void rm_run_step(RmMigration *m, int step_index, bool revert, int batch);
extern void rm_run_helper(RmRun *run);
extern void rm_run_free_step(const char *approach, const RmStep *step,
							 bool revert, void *work);
extern ErrorData *rm_between(RmRun *run, void (*work) (void *arg), void *arg);
extern ErrorData *rm_rest(RmRun *run, int ms);
extern ErrorData *rm_show_wait(RmRun *run, const char *kind, const char *reason);
extern ErrorData *rm_try_here(void (*work) (void *arg), void *arg, MemoryContext cxt);
extern ErrorData *rm_try(void (*work) (void *arg), void *arg, MemoryContext cxt);
extern ErrorData *rm_rehearse(void (*work) (void *arg), void *arg, MemoryContext cxt);
extern void rm_transaction(void (*work) (void *arg), void *arg);
extern void rm_execute(const char *sql);
extern bool rm_wait_latch(int ms, MemoryContext cxt, ErrorData **error);
extern bool rm_notice_due(RmRun *run);
extern void rm_begin_again(RmRun *run, const char *why);
extern double rm_elapsed_ms(instr_time since);

#endif							/* RM_MIGRATION_H */
